"""A run's record together with its noise-level validations, as a report compares them."""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sdtrain.config.trusted import renewed
from sdtrain.evaluation.noise_level_error import LEVELS, NoiseLevelErrors
from sdtrain.runs.reader import RunRecord


@dataclass
class Validation:
    """One look: errors by picture and level, and what they were taken on.

    pictures: a hash of each.
    weights: "averaged", or "raw" of a run that keeps no average.
    """

    images_seen: int
    found: NoiseLevelErrors
    pictures: list[str]
    latents: "Latents"
    weights: str

    def why_not_comparable(self, other: "Validation") -> str | None:
        """Why its numbers mean something else than the other's, or None."""
        reason = self.latents.difference(other.latents)
        if reason:
            return reason
        count = min(len(self.pictures), len(other.pictures))
        same = self.pictures[:count] == other.pictures[:count]
        return None if same else "other validation pictures"


@dataclass
class Latents:
    """What the latents of a run are.

    autoencoder: the hash of its weights. mean, variance: of the training pictures' latents.
    """

    autoencoder: str | None
    scale: float | None
    mean: Tensor
    variance: Tensor

    def difference(self, other: "Latents") -> str | None:
        """In what these are other latents, or None."""
        if self.autoencoder != other.autoencoder:
            return "another autoencoder"
        if self.scale != other.scale:
            return "another latent scale"
        if _is_near(self.mean, other.mean) and _is_near(self.variance, other.variance):
            return None
        return "latents of another mean or variance: other training pictures"


def _is_near(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@dataclass(eq=False)
class MeasuredRun(RunRecord):
    """A record whose configuration says the present names of its classes, and whose looks are read.

    validations: by images seen, whole ones of today's levels.
    """

    validations: list[Validation] = field(default_factory=list)

    @property
    def last(self) -> Validation | None:
        """The newest look."""
        return self.validations[-1] if self.validations else None

    @property
    def seed(self) -> str:
        """As it was configured."""
        return str(self.config.get("seed"))


def measure(records: Iterable[RunRecord]) -> list[MeasuredRun]:
    """Reads the looks of each record."""
    runs = []
    for record in records:
        values = vars(record) | {"config": renewed(record.config)}
        runs.append(MeasuredRun(**values, validations=_validations(record)))
    return runs


def _validations(record: RunRecord) -> list[Validation]:
    found = []
    for look in record.looks:
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RuntimeError):
            validation = _validation(look)
            # One beyond the end of a finished run is of an earlier process, which went further.
            is_over = record.state == "finished" and look["images_seen"] > record.images_seen
            if validation is not None and not is_over:
                found.append(validation)
    return found


def _validation(look: dict[str, Any]) -> Validation | None:
    """None of another version's levels, and of what is not whole."""
    if look["log_snr"] != LEVELS.tolist():
        return None
    weights = "ema" if look["errors"].get("ema") else "raw"
    errors = torch.tensor(look["errors"][weights], dtype=torch.float64)
    linear = torch.tensor(look["linear"], dtype=torch.float64)
    inside = torch.tensor(look["inside"])
    expected = (len(look["pictures"]), len(LEVELS))
    if not errors.shape == linear.shape == expected or inside.shape != LEVELS.shape:
        return None
    return Validation(
        look["images_seen"],
        NoiseLevelErrors(errors, linear, inside),
        look["pictures"],
        Latents(
            autoencoder=look["autoencoder"],
            scale=look["latent_scale"],
            mean=torch.tensor(look["mean"]),
            variance=torch.tensor(look["variance"]),
        ),
        "averaged" if weights == "ema" else "raw",
    )
