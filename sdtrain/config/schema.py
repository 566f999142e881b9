"""The keys of each command, as dataclasses: a configuration is checked as a call of its class.
Without torch.
"""

from dataclasses import dataclass
from typing import Literal

from sdtrain.errors import UserError

Accelerator = Literal["auto", "cpu", "gpu"]  # no MPS: it lacks the float64 that times are kept in


@dataclass(frozen=True)
class FirstStage:
    """first_stage: the experiment that trains the autoencoder, and its length in images."""

    experiment: str
    max_images: int


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What `sdtrain` takes. Nodes of type object are built by their own _target_."""

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
    resume: Literal["never", "auto", "must"]
    resume_allow: list[str]
    schedule: object = None
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

    every: images seen between checkpoints. keep: the newest that stay. max_failed_saves: saves that
    may fail in a row before the run ends.
    """

    every: int
    keep: int
    max_failed_saves: int

    def __post_init__(self) -> None:
        at_least(self.every, 1, "checkpoint.every")
        at_least(self.max_failed_saves, 0, "checkpoint.max_failed_saves")
        if self.keep < 2:
            raise UserError(
                "must be at least 2: a damaged checkpoint needs a spare",
                key="checkpoint.keep",
                value=self.keep,
            )


@dataclass(frozen=True, kw_only=True)
class LooksSettings:
    """looks: what samples and validations may cost.

    share: of the run's network evaluations, all looks together; None for no limit.
    """

    share: float | None = 0.05

    def __post_init__(self) -> None:
        if self.share is not None and not 0 < self.share <= 1:
            raise UserError(
                "must lie in (0, 1], or be null for no limit", key="looks.share", value=self.share
            )


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """trainer: length, device and pace of a run. Budgets and intervals count images.

    deterministic: torch's operations are chosen so that a GPU gives the same bits each time.
    """

    max_images: int
    accelerator: Accelerator
    devices: int
    precision: Literal["32-true", "bf16-mixed", "16-mixed"]
    accumulate: int
    gradient_clip: float
    max_skipped: int | None
    log_every: int
    threads: int | None
    max_minutes: float | None
    deterministic: bool = False

    def __post_init__(self) -> None:
        for name in ("max_images", "devices", "accumulate", "log_every"):
            at_least(getattr(self, name), 1, f"trainer.{name}")
        if self.max_skipped is not None and self.max_skipped < 0:
            raise UserError(
                "must be at least 0, or null", key="trainer.max_skipped", value=self.max_skipped
            )
        if self.precision == "16-mixed" and self.max_skipped is None:
            # The loss scale of 16-mixed overflows now and then; that is how it is found.
            raise UserError(
                "needs trainer.max_skipped: steps whose scaled gradient overflows are left out",
                key="trainer.precision",
                value=self.precision,
                remedy="Set trainer.max_skipped, to 1000 say.",
            )
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise UserError(
                "must be above 0, or null for no limit of time",
                key="trainer.max_minutes",
                value=self.max_minutes,
            )
        if self.threads is not None and self.threads < 1:
            raise UserError(
                "must be at least 1, or null for the machine's number",
                key="trainer.threads",
                value=self.threads,
            )
        if not self.gradient_clip > 0:
            raise UserError(
                "must be above 0; .inf does not clip",
                key="trainer.gradient_clip",
                value=self.gradient_clip,
            )


@dataclass(frozen=True, kw_only=True)
class DrawingConfig:
    """What the commands take that draw with a trained model. data: {argument of the run's data set:
    value} of what differs from the run's own.
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
    data: dict
    allow: list[str]

    def __post_init__(self) -> None:
        for name in ("num_images", "steps", "batch_size"):
            at_least(getattr(self, name), 1, name)
        for name in ("sampler", "grid", "guidance"):
            if not getattr(self, name):
                raise UserError(
                    f"{name} is missing", key=name, remedy=f"Choose one with {name}=NAME."
                )


@dataclass(frozen=True, kw_only=True)
class SampleConfig(DrawingConfig):
    """What `sdtrain-sample` takes."""

    prompt: list[str] | str | None
    prompt_file: str | None
    negative_prompt: str
    label: list[int | str] | int | str | None
    guidance_scale: float
    output: str


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(DrawingConfig):
    """What `sdtrain-evaluate` takes. metrics: {name: node of configs/metric/NAME.yaml}."""

    metrics: dict
    guidance_scale: float | None
    output: str | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.metrics:
            raise UserError(
                "metrics is empty", key="metrics", remedy="Choose one with metrics=NAME."
            )


def at_least(value: int, least: int, key: str) -> None:
    """Raises UserError for a value below `least`."""
    if value < least:
        raise UserError(f"must be at least {least}", key=key, value=value)


def micro_batch(batch_size: int, world: int, accumulate: int) -> int:
    """Pictures of one rank's micro-batch. UserError where the global batch cannot be divided so."""
    size, rest = divmod(batch_size, world * accumulate)
    if rest or size == 0:
        raise UserError(
            "is the global batch; it must be a multiple of trainer.devices x trainer.accumulate = "
            f"{world} x {accumulate}",
            key="data.batch_size",
            value=batch_size,
            remedy="Change data.batch_size.",
        )
    return size
