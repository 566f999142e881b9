"""Which pictures to draw, and how."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sdtrain.conditioning.interface import Conditioner
from sdtrain.diffusion import Denoise
from sdtrain.samplers import Sampler
from sdtrain.schedules import Schedule

Guidance = Callable[[Mapping[str, Denoise], float, Schedule], Denoise]
"""(denoisers, guidance_scale, schedule) -> guided denoiser; the keys of the denoisers stand in
sdtrain.diffusion.guidance."""


@dataclass(frozen=True)
class StartPicture:
    """A given picture with which image-to-image begins.

    file: that it was read from, which has own_size (width, height). image: what is drawn from,
    [3, H, W] in [-1, 1]. mask: bool [1, H, W], true where new
    content is drawn; the rest is kept. None draws everywhere.
    """

    file: Path
    own_size: tuple[int, int]
    image: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True)
class DepthMap:
    """A given or estimated depth map.

    file: that it was read from; None if it was estimated. own_size: (width, height) of the file or
    of the picture that it was estimated of. values: [1, H, W], 1 nearest, 0 farthest.
    """

    file: Path | None
    own_size: tuple[int, int]
    values: Tensor


@dataclass(frozen=True)
class GivenPictures:
    """What the user gives for one picture beside its prompt: each is None if it is not given."""

    start: StartPicture | None = None
    depth: DepthMap | None = None


@dataclass(frozen=True)
class Request:
    """One picture to draw.

    Of prompt, negative_prompt, label and depth only those matter that the model reads. depth
    [1, H, W]: inverse depth, 1 nearest and 0 farthest. start: the picture to begin with, or None
    for pure noise. depth_file: that the depth map was read from, if it was.
    """

    seed: int
    prompt: str = ""
    negative_prompt: str = ""
    label: int = 0
    depth: Tensor | None = None
    start: StartPicture | None = None
    depth_file: Path | None = None

    def title(self, conditioner: Conditioner) -> str:
        """Return the caption to print below the picture: prompt, class or seed."""
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

    sampler: see sdtrain.samplers. grid: (steps, schedule) -> falling times. steps: number of times.
    guidance_scale: 1 is no guidance. batch_size: pictures drawn at once. strength: share of the
    steps that are run if there is a start picture: the last ones, rounded down. 0 only encodes and
    decodes it, 1 draws from pure noise. records: names and arguments of sampler, grid and guidance,
    see `record_of`.
    """

    sampler: Sampler
    grid: Callable[[int, Schedule], Tensor]
    guidance: Guidance
    steps: int
    guidance_scale: float
    batch_size: int = 64
    strength: float = 1.0
    records: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides which picture a seed and a prompt give, as plain values for JSON."""
        return {"steps": self.steps, "guidance_scale": self.guidance_scale, **self.records}

    @property
    def sampler_name(self) -> str:
        """Name and arguments of the sampler, for messages."""
        return format_record(self.records.get("sampler", {"name": "this"}))


def record_of(node: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of a node of the configuration, as in {"name": "ddim", "eta": 0.0}.

    The name of a part that is not sdtrain's own is the whole path of its target.
    """
    target = node["_target_"]
    name = target.rpartition(".")[2] if target.startswith("sdtrain.") else target
    arguments = {key: value for key, value in node.items() if key not in ("_target_", "_partial_")}
    return {"name": name, **arguments}


def format_record(record: object) -> str:
    """Format a record of `record_of` as "ddim eta=0.0".

    Earlier versions wrote the target instead, of which the last part is returned.
    """
    if not isinstance(record, Mapping):
        return str(record).rpartition(".")[2]
    words = [str(record.get("name"))]
    for key, value in record.items():
        if key != "name" and value is not None:
            words.append(f"{key}={value}")
    return " ".join(words)
