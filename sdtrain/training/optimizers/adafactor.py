"""Adafactor: AdamW without a first moment, and with the second moment of a matrix as a row and a
column (Shazeer and Stern 2018).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import transformers
from torch import Tensor

from sdtrain.errors import UserError
from sdtrain.training.optimizers.checks import check_not_negative

EPSILON = 1e-16
"""Is added to the squared gradient: the square of AdamW's 1e-8. With the paper's 1e-30, weights
whose gradient is 0 but for rounding, as the bias of an attention's keys, would take full steps.
"""


class Adafactor(transformers.Adafactor):
    """Adafactor whose learning rate is in the units of AdamW's.

    The step is lr times the update, as for AdamW. Neither torch.optim.Adafactor nor the paper has
    that: they multiply it by the size of the weights, so that a rate made for AdamW hardly trains.
    transformers' implementation leaves that out with scale_parameter and relative_step.

    The weight of a convolution [O, I, h, w] is factored as the matrix [O, I h w]. Factored over its
    last two dimensions, as the base class would do, a kernel of 1 x 1 takes as much memory as with
    AdamW.

    Args:
        params: parameter groups.
        lr: peak learning rate.
        weight_decay: decoupled, as in AdamW.
        decay_rate: the second moment's decay in step t is 1 - t ** decay_rate (section 7.2).
        clip_threshold: the update of a tensor is scaled down to this root mean square (section 6).
        beta1: decay of a first moment, which takes four bytes a weight; None for none.

    Raises UserError for a setting out of range.
    """

    def __init__(
        self,
        params: Iterable[dict],
        *,
        lr: float,
        weight_decay: float = 0.0,
        decay_rate: float = -0.8,
        clip_threshold: float = 1.0,
        beta1: float | None = None,
    ) -> None:
        check_not_negative(lr=lr, weight_decay=weight_decay)
        _check_adafactor(decay_rate, clip_threshold, beta1)
        super().__init__(
            params,
            lr=lr,
            eps=(EPSILON, 0.0),
            weight_decay=weight_decay,
            decay_rate=decay_rate,
            clip_threshold=clip_threshold,
            beta1=beta1,
            scale_parameter=False,
            relative_step=False,
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Take a step, and return what `closure` does, which computes the gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with _as_matrices(self.param_groups):
            super().step()
        return loss


def _check_adafactor(decay_rate: float, clip_threshold: float, beta1: float | None) -> None:
    """Raise UserError for settings with which the update is not defined, or always 0."""
    if not decay_rate < 0:
        raise UserError("must be below 0", key="optimizer.decay_rate", value=decay_rate)
    if not clip_threshold > 0:
        raise UserError("must be above 0", key="optimizer.clip_threshold", value=clip_threshold)
    if beta1 is not None and not 0 <= beta1 < 1:
        raise UserError("must lie in [0, 1), or be null", key="optimizer.beta1", value=beta1)


@contextmanager
def _as_matrices(groups: Iterable[dict]) -> Iterator[None]:
    """Give each weight of more than two dimensions, and its gradient, the shape of a matrix within
    the `with` block. The values are shared.
    """
    reshaped = []
    for group in groups:
        for parameter in group["params"]:
            if parameter.grad is None or parameter.ndim <= 2 or not parameter.is_contiguous():
                continue
            reshaped.append((parameter, parameter.data, parameter.grad))
            _replace(parameter, parameter.data.flatten(1), parameter.grad.flatten(1))
    try:
        yield
    finally:
        for parameter, data, gradient in reshaped:
            _replace(parameter, data, gradient)


def _replace(parameter: Tensor, data: Tensor, gradient: Tensor) -> None:
    parameter.grad = None  # torch refuses a gradient of another shape than the data
    parameter.data = data
    parameter.grad = gradient
