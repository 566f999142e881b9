"""AdamW with moments of 8 bits (Dettmers et al. 2022), from the package bitsandbytes."""

from collections.abc import Iterable, Sequence

from torch.optim import Optimizer

from sdtrain.config.optimizers import missing_package
from sdtrain.training.optimizers.checks import check_betas, check_not_negative


def adamw_8bit(
    params: Iterable[dict],
    *,
    lr: float,
    betas: Sequence[float] = (0.9, 0.999),
    weight_decay: float = 0.01,
    min_8bit_size: int = 4096,
) -> Optimizer:
    """Return an AdamW whose moments are quantized in blocks of 256 values with a scale each.

    Args:
        params: parameter groups.
        lr: peak learning rate.
        betas: decay of the two moments.
        weight_decay: decoupled.
        min_8bit_size: tensors with fewer values keep moments of 32 bits.

    Raises UserError if bitsandbytes cannot be imported, and for a setting out of range.
    """
    check_not_negative(lr=lr, weight_decay=weight_decay, min_8bit_size=min_8bit_size)
    check_betas(betas)
    try:
        from bitsandbytes.optim import AdamW8bit
    except (ImportError, OSError, RuntimeError) as error:  # its library may not fit the machine
        raise missing_package("adamw_8bit", error) from error
    return AdamW8bit(
        params,
        lr=lr,
        betas=tuple(betas),
        weight_decay=weight_decay,
        min_8bit_size=min_8bit_size,
    )
