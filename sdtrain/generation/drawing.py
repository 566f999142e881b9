"""What is to be drawn, and how."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from sdtrain.conditioning.interface import Conditioner
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

    def title(self, conditioner: Conditioner) -> str:
        """What stands below the picture."""
        if self.prompt:
            return self.prompt
        if "label" not in conditioner.reads:
            return f"seed {self.seed}"
        class_names = conditioner.class_names
        name = f" ({class_names[self.label]})" if self.label < len(class_names) else ""
        return f"class {self.label}{name}"


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
