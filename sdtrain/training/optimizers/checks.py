"""Checks of settings that the packages behind the optimizers accept without a word."""

from collections.abc import Sequence

from sdtrain.errors import UserError


def check_not_negative(**settings: float | None) -> None:
    """Raise UserError for a setting below 0; None stands for a setting that is not given."""
    for name, value in settings.items():
        if value is not None and not value >= 0:
            key = f"optimizer.{name}"
            raise UserError("must be at least 0", key=key, value=value, remedy=f"Change {key}.")


def check_betas(betas: Sequence[float]) -> None:
    """Raise UserError unless both decay rates lie in [0, 1)."""
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(
            "must be two numbers, each at least 0 and below 1",
            key="optimizer.betas",
            value=list(betas),
        )
