"""The keys of each command, as dataclasses. A configuration is checked as a call of its class.

Needs no torch.
"""

from dataclasses import dataclass
from typing import Literal

from sdtrain.errors import UserError

Accelerator = Literal["auto", "cpu", "gpu"]  # no MPS: it lacks float64, which times need


@dataclass(frozen=True)
class FirstStage:
    """first_stage: the experiment that trains the autoencoder, and its length in images."""

    experiment: str
    max_images: int


@dataclass(frozen=True)
class MovedModel:
    """model, of a command that reads a run: where the run's pretrained weights are now."""

    pretrained: str | None = None


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The configuration of `sdtrain`. Nodes of type object are built by their own _target_."""

    name: str
    seed: int
    data: object
    model: object
    optimizer: object
    lr_schedule: object
    trainer: object
    strategy: object
    checkpoint: dict
    looks: dict | None = None
    cache: dict | None = None
    resume: Literal["never", "auto", "must"]
    resume_allow: list[str]
    schedule: object = None
    adapter: object = None
    modifiers: dict | None = None
    prediction: object = None
    weighting: object = None
    loss: object = None
    times: object = None
    noise: object = None
    sampler: object = None
    grid: object = None
    guidance: object = None
    steps: int = 30
    guidance_scale: float = 1.0
    callbacks: dict | None = None
    validation: object = None
    logger: object = None
    first_stage: FirstStage | None = None


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """checkpoint: when weights are saved.

    Args:
        every: images seen between two checkpoints.
        keep: number of newest checkpoints that are kept.
        max_failed_saves: consecutive saves that may fail before the run ends.
    """

    every: int
    keep: int
    max_failed_saves: int

    def __post_init__(self) -> None:
        check_at_least(self.every, 1, "checkpoint.every")
        check_at_least(self.max_failed_saves, 0, "checkpoint.max_failed_saves")
        if self.keep < 2:
            raise UserError(
                "must be at least 2: a damaged checkpoint needs a spare",
                key="checkpoint.keep",
                value=self.keep,
            )


@dataclass(frozen=True, kw_only=True)
class LooksSettings:
    """looks: what sampling and validation during training may cost.

    share: largest number of network evaluations of all looks together, as a fraction of those that
    training makes; None for no limit.
    """

    share: float | None = 0.05

    def __post_init__(self) -> None:
        if self.share is not None and not 0 < self.share <= 1:
            raise UserError(
                "must lie in (0, 1], or be null for no limit", key="looks.share", value=self.share
            )


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """cache: how the latents of data.cache are stored.

    dtype: fp16 takes half the space and rounds them.
    """

    dtype: Literal["fp32", "fp16"] = "fp32"


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """trainer: length, device and precision of a run. Lengths and intervals are in images.

    precision: "auto" is resolved before the run begins (sdtrain/training/precision.py).
    deterministic: restrict torch to operations that give the same bits each time on a GPU.
    probe: measure a few steps instead of training (sdtrain/training/probe.py).
    """

    max_images: int
    accelerator: Accelerator
    devices: int
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"]
    accumulate: int
    gradient_clip: float
    max_skipped: int | None
    log_every: int
    threads: int | None
    max_minutes: float | None
    deterministic: bool = False
    probe: bool = False

    def __post_init__(self) -> None:
        for name in ("max_images", "devices", "accumulate", "log_every"):
            check_at_least(getattr(self, name), 1, f"trainer.{name}")
        if self.max_skipped is not None and self.max_skipped < 0:
            raise UserError(
                "must be at least 0, or null", key="trainer.max_skipped", value=self.max_skipped
            )
        if self.precision == "16-mixed" and self.max_skipped is None:
            # The loss scale is found by letting gradients overflow now and then.
            raise UserError(
                "needs trainer.max_skipped: steps whose scaled gradient overflows are skipped",
                key="trainer.precision",
                value=self.precision,
                remedy="Set trainer.max_skipped, for example to 1000.",
            )
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise UserError(
                "must be above 0, or null for no time limit",
                key="trainer.max_minutes",
                value=self.max_minutes,
            )
        if self.threads is not None and self.threads < 1:
            raise UserError(
                "must be at least 1, or null for the default of this machine",
                key="trainer.threads",
                value=self.threads,
            )
        if not self.gradient_clip > 0:
            raise UserError(
                "must be above 0, or .inf to disable clipping",
                key="trainer.gradient_clip",
                value=self.gradient_clip,
            )


@dataclass(frozen=True, kw_only=True)
class DrawingConfig:
    """Keys that `sdtrain-sample` and `sdtrain-evaluate` have in common.

    data: {argument of the run's data set: value}, for the arguments that should differ from those
    of the run.
    """

    checkpoint: str
    num_images: int
    seed: int
    steps: int
    sampler: object
    grid: object
    guidance: object
    batch_size: int
    ema: bool
    accelerator: Accelerator
    autoencoder: str | None
    model: MovedModel
    data: dict
    allow: list[str]

    def __post_init__(self) -> None:
        for name in ("num_images", "steps", "batch_size"):
            check_at_least(getattr(self, name), 1, name)
        for name in ("sampler", "grid", "guidance"):
            if not getattr(self, name):
                remedy = f"Set {name}=NAME, a file of configs/{name}/."
                raise UserError(f"{name} is missing", key=name, remedy=remedy)


@dataclass(frozen=True, kw_only=True)
class SampleConfig(DrawingConfig):
    """The configuration of `sdtrain-sample`."""

    prompt: list[str] | str | None
    prompt_file: str | None
    negative_prompt: str
    label: list[int | str] | int | str | None
    guidance_scale: float
    image_size: int | list[int] | None
    init_image: str | None
    depth: str | None
    depth_model: str | None
    mask: str | None
    strength: float | None
    embedding: list[str] | str | None
    lora: list[str] | str | None
    lora_weight: list[float] | float | None
    output: str
    attention: bool
    save_latents: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strength is not None and not 0 <= self.strength <= 1:
            raise UserError("must lie in [0, 1]", key="strength", value=self.strength)
        if self.image_size is None:
            return
        is_square = isinstance(self.image_size, int)
        sides = [self.image_size] if is_square else self.image_size
        if min(sides, default=0) < 1 or not is_square and len(sides) != 2:
            raise UserError(
                "must be a side of at least 1 pixel, or [HEIGHT,WIDTH]",
                key="image_size",
                value=self.image_size,
            )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(DrawingConfig):
    """The configuration of `sdtrain-evaluate`.

    metrics: {name: node of configs/metric/NAME.yaml}.
    """

    metrics: dict
    guidance_scale: float | None
    output: str | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.metrics:
            raise UserError(
                "metrics is empty", key="metrics", remedy="Choose one with metrics=NAME."
            )


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The configuration of `sdtrain-export`."""

    checkpoint: str
    output: str
    dtype: Literal["fp32", "fp16"]
    format: Literal["folder", "single_file", "embedding", "diffusers", "kohya"]
    ema: bool
    autoencoder: str | None
    model: MovedModel
    allow: list[str]


def check_at_least(value: int, least: int, key: str) -> None:
    """Raise UserError for a value below `least`."""
    if value < least:
        raise UserError(f"must be at least {least}", key=key, value=value)


def micro_batch_size(batch_size: int, world_size: int, accumulate: int) -> int:
    """Return the number of pictures in a micro-batch of one rank.

    Raises UserError if the global batch cannot be divided evenly.
    """
    divisor = world_size * accumulate
    size, rest = divmod(batch_size, divisor)
    if rest or size == 0:
        raise UserError(
            "is the global batch; it must be a multiple of trainer.devices x trainer.accumulate = "
            f"{world_size} x {accumulate}",
            key="data.batch_size",
            value=batch_size,
            remedy="Change data.batch_size.",
        )
    return size
