"""Muon for the matrices of linear layers and AdamW for all other weights, as one optimizer."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from sdtrain.errors import UserError
from sdtrain.training.optimizers.checks import check_betas, check_not_negative
from sdtrain.training.parameter_groups import IS_MATRIX


class Muon(torch.optim.Optimizer):
    """Updates matrices by their orthogonalized momentum (Jordan et al. 2024), the rest by AdamW.

    The weights of linear layers are the matrices. Convolutions, biases, norms and all other tensors
    go to AdamW. So do embeddings, of which a step changes few rows, and with them the network's
    last layer where it is a convolution, as in a UNet: Jordan et al. found that both train better
    with AdamW.

    An orthogonal update is scaled by 0.2 sqrt(max(rows, columns)), the root mean square of AdamW's
    updates (Liu et al. 2025, section 2.2), so that one learning rate and one weight decay serve
    both parts.

    Args:
        params: parameter groups, in each of which IS_MATRIX says which part it belongs to.
        lr: peak learning rate of the matrices.
        adamw_lr: that of all other weights; None takes lr. A group's own rate comes first.
        weight_decay: decoupled, of both parts.
        momentum: decay of the momentum of the matrices.
        nesterov: whether the update looks one step of the momentum ahead.
        ns_steps: Newton-Schulz iterations of the orthogonalization.
        betas: decay of AdamW's moments.

    Raises UserError without matrices, and for a setting out of range.
    """

    splits_matrices: ClassVar[bool] = True

    def __init__(
        self,
        params: Iterable[dict],
        *,
        lr: float,
        adamw_lr: float | None = None,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        betas: Sequence[float] = (0.9, 0.999),
    ) -> None:
        check_not_negative(lr=lr, adamw_lr=adamw_lr, weight_decay=weight_decay)
        check_betas(betas)
        _check_muon(momentum, ns_steps)
        groups = list(params)
        matrices = [group for group in groups if group[IS_MATRIX]]
        others = [group for group in groups if not group[IS_MATRIX]]
        if not matrices:
            raise UserError(
                "optimizer=muon has nothing to do: no linear layer of the model is trained",
                key="optimizer",
                remedy="Choose optimizer=adamw.",
            )
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                matrices,
                lr=lr,
                weight_decay=weight_decay,
                momentum=momentum,
                nesterov=nesterov,
                ns_steps=ns_steps,
                adjust_lr_fn="match_rms_adamw",
            )
        ]
        if others:
            rate = lr if adamw_lr is None else adamw_lr
            adamw = torch.optim.AdamW(
                others, lr=rate, betas=tuple(betas), weight_decay=weight_decay, fused=True
            )
            self.parts.append(adamw)
        groups_of_parts = [part.param_groups for part in self.parts]
        super().__init__(sum(groups_of_parts, []), {})
        self._share()

    def _share(self) -> None:
        """Let both parts work on the groups and the state of this optimizer."""
        muon_part, *adamw_parts = self.parts
        muon_part.param_groups = [group for group in self.param_groups if group[IS_MATRIX]]
        for part in adamw_parts:
            part.param_groups = [group for group in self.param_groups if not group[IS_MATRIX]]
        for part in self.parts:
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Take a step, and return what `closure` does, which computes the gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


def _check_muon(momentum: float, ns_steps: int) -> None:
    """Raise UserError for settings with which the update of a matrix is not defined."""
    if not 0 <= momentum < 1:
        raise UserError("must lie in [0, 1)", key="optimizer.momentum", value=momentum)
    if not 1 <= ns_steps < 100:
        raise UserError("must lie between 1 and 99", key="optimizer.ns_steps", value=ns_steps)
