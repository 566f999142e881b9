"""What is to be drawn, and how."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from sdtrain.diffusion import Denoise
from sdtrain.samplers import Sampler
from sdtrain.schedules import Schedule

Guidance = Callable[[Mapping[str, Denoise], float, Schedule], Denoise]
"""(denoisers by what they are told, guidance_scale, schedule) -> guided denoiser: see
sdtrain.diffusion.guidance."""


@dataclass(frozen=True)
class Request:
    """One picture to draw. Of prompt, negative_prompt, label and depth those count that the model's
    conditioner reads.

    depth [1, H, W]: inverse depth, 1 nearest and 0 farthest.
    """

    seed: int
    prompt: str = ""
    negative_prompt: str = ""
    label: int = 0
    depth: Tensor | None = None

    def title(self, reads: Collection[str]) -> str:
        """What stands below the picture; reads: of the conditioner."""
        if self.prompt:
            return self.prompt
        return f"class {self.label}" if "label" in reads else f"seed {self.seed}"


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn.

    sampler: see sdtrain.samplers. grid: (steps, schedule) -> falling times. steps: times visited.
    guidance_scale: 1 is no guidance. batch_size: pictures drawn at once.
    """

    sampler: Sampler
    grid: Callable[[int, Schedule], Tensor]
    guidance: Guidance
    steps: int
    guidance_scale: float
    batch_size: int = 64
