"""What is to be drawn, and how."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

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
    guidance_scale: 1 is no guidance. batch_size: pictures drawn at once. chosen: what sampler, grid
    and guidance are called, with their arguments, for records: see `named`.
    """

    sampler: Sampler
    grid: Callable[[int, Schedule], Tensor]
    guidance: Guidance
    steps: int
    guidance_scale: float
    batch_size: int = 64
    chosen: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides what comes of a seed and a prompt, as plain values for JSON."""
        return {"steps": self.steps, "guidance_scale": self.guidance_scale, **self.chosen}

    @property
    def sampler_name(self) -> str:
        """For messages: as it was chosen, with its arguments."""
        return in_words(self.chosen.get("sampler", {"name": "this"}))


def named(node: Mapping[str, Any]) -> dict[str, Any]:
    """A node of a configuration as a record: {"name": "ddim", "eta": 0.0}.

    The user's own parts are called by the whole path of their target.
    """
    target = node["_target_"]
    name = target.rpartition(".")[2] if target.startswith("sdtrain.") else target
    arguments = {key: value for key, value in node.items() if key not in ("_target_", "_partial_")}
    return {"name": name, **arguments}


def in_words(record: object) -> str:
    """ "ddim eta=0.0" of a record by `named`, and of the target that earlier versions wrote."""
    if not isinstance(record, Mapping):
        return str(record).rpartition(".")[2]
    words = [str(record.get("name"))]
    for key, value in record.items():
        if key != "name" and value is not None:
            words.append(f"{key}={value}")
    return " ".join(words)
