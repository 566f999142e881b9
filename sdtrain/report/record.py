"""A run's record with its noise-level validations, as a report compares them."""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sdtrain.config.trusted import upgrade_config
from sdtrain.evaluation.noise_level_error import LEVELS, NoiseLevelErrors
from sdtrain.runs.reader import RunRecord


@dataclass
class LatentSpace:
    """What identifies the latents that a run was trained and validated on.

    autoencoder: the hash of its weights, None where there is no autoencoder.
    mean, variance: of the latents of the training pictures.
    """

    autoencoder: str | None
    scale: float | None
    mean: Tensor
    variance: Tensor

    def difference_from(self, other: "LatentSpace") -> str | None:
        """Return in words the first difference of the latent spaces, or None if there is none."""
        if self.autoencoder != other.autoencoder:
            return "autoencoder"
        if self.scale != other.scale:
            return "latent scale"
        if _is_close(self.mean, other.mean) and _is_close(self.variance, other.variance):
            return None
        return "mean or variance of the training pictures' latents"


def _is_close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@dataclass
class ValidationRecord:
    """One noise-level validation: the errors by picture and level, and what they were measured on.

    picture_hashes: one for each validation picture, in the order of the rows of `result`.
    weights: "averaged", or "raw" for a run that keeps no average.
    """

    images_seen: int
    result: NoiseLevelErrors
    picture_hashes: list[str]
    latents: LatentSpace
    weights: str

    def difference_from(self, other: "ValidationRecord") -> str | None:
        """Return the difference that makes the two incomparable, or None where they compare."""
        difference = self.latents.difference_from(other.latents)
        if difference:
            return difference
        count = min(len(self.picture_hashes), len(other.picture_hashes))
        if self.picture_hashes[:count] != other.picture_hashes[:count]:
            return "validation pictures"
        return None


@dataclass(eq=False)
class MeasuredRun(RunRecord):
    """A run's record whose configuration names classes by their present paths, with validations.

    validations: in order of images seen; only complete ones at the present LEVELS.
    """

    validations: list[ValidationRecord] = field(default_factory=list)

    @property
    def last_validation(self) -> ValidationRecord | None:
        """The newest validation, or None where there is none."""
        return self.validations[-1] if self.validations else None

    @property
    def seed(self) -> str:
        """The configured seed."""
        return str(self.config.get("seed"))


def read_validations(records: Iterable[RunRecord]) -> list[MeasuredRun]:
    """Return each record as a MeasuredRun, with its noise-level validations parsed."""
    runs = []
    for record in records:
        values = vars(record) | {"config": upgrade_config(record.config)}
        runs.append(MeasuredRun(**values, validations=_usable_validations(record)))
    return runs


def _usable_validations(record: RunRecord) -> list[ValidationRecord]:
    usable = []
    for saved in record.raw_validations:
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RuntimeError):
            validation = _parse_validation(saved)
            # A validation later than the end of a finished run was left by an earlier process,
            # which had gone further.
            is_stale = record.state == "finished" and saved["images_seen"] > record.images_seen
            if validation is not None and not is_stale:
                usable.append(validation)
    return usable


def _parse_validation(saved: dict[str, Any]) -> ValidationRecord | None:
    """Return one record of validation/, or None where its levels or shapes are not the expected."""
    if saved["log_snr"] != LEVELS.tolist():
        return None
    weights = "ema" if saved["errors"].get("ema") else "raw"
    errors = torch.tensor(saved["errors"][weights], dtype=torch.float64)
    linear = torch.tensor(saved["linear"], dtype=torch.float64)
    inside = torch.tensor(saved["inside"])
    expected = (len(saved["pictures"]), len(LEVELS))
    if not errors.shape == linear.shape == expected or inside.shape != LEVELS.shape:
        return None
    return ValidationRecord(
        images_seen=saved["images_seen"],
        result=NoiseLevelErrors(errors, linear, inside),
        picture_hashes=saved["pictures"],
        latents=LatentSpace(
            autoencoder=saved["autoencoder"],
            scale=saved["latent_scale"],
            mean=torch.tensor(saved["mean"]),
            variance=torch.tensor(saved["variance"]),
        ),
        weights="averaged" if weights == "ema" else "raw",
    )
