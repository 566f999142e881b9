"""Schedule-free AdamW (Defazio et al. 2024), from the package schedulefree."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sdtrain.config.optimizers import missing_package
from sdtrain.errors import UserError
from sdtrain.training.optimizers.checks import check_betas, check_not_negative

POINT = "y"
"""Key, in the state of a parameter, of the weights at which gradients are taken. It is there only
while the parameter has its averaged value."""


class ScheduleFree(torch.optim.Optimizer):
    """AdamW that averages its weights instead of lowering its learning rate.

    It has three sequences: z takes AdamW's steps without a first moment, x is an average of z, and
    gradients are taken at y = (1 - beta1) z + beta1 x. A parameter holds y, its state z. Inside
    `applied` it holds x, which is what is sampled, validated and saved; y is kept aside and not
    computed back, so that training goes on with the same bits whether or not anything looked.

    A checkpoint's weights are x, and y and z are in its optimizer's state: loading that state puts
    y back into the parameters.

    Args:
        params: parameter groups.
        lr: learning rate after the warm-up.
        betas: beta1, the share of x in y; the decay of the second moment.
        weight_decay: decoupled, at y.
        r: power of the step number in the weights of the average; 0 weighs all steps alike.

    Raises UserError if schedulefree cannot be imported, and for a setting out of range.
    """

    counters: ClassVar[frozenset[str]] = frozenset(
        {"k", "train_mode", "weight_sum", "lr_max", "scheduled_lr"}
    )
    """Entries of a group that a step changes: they are state and no settings."""

    def __init__(
        self,
        params: Iterable[dict],
        *,
        lr: float,
        betas: Sequence[float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        r: float = 0.0,
    ) -> None:
        check_not_negative(lr=lr, weight_decay=weight_decay, r=r)
        check_betas(betas)
        if betas[0] == 0:
            # x is computed from y and z by a division by beta1.
            raise UserError(
                "must begin with a number above 0", key="optimizer.betas", value=list(betas)
            )
        try:
            from schedulefree import AdamWScheduleFree
        except ImportError as error:
            raise missing_package("schedule_free", error) from error
        self.inner = AdamWScheduleFree(
            params, lr=lr, betas=tuple(betas), weight_decay=weight_decay, r=r
        )
        super().__init__(self.inner.param_groups, {})
        self._share()
        self.inner.train()

    def _share(self) -> None:
        """Let the package's optimizer work on the groups and the state of this one."""
        self.inner.param_groups = self.param_groups
        self.inner.state = self.state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, and give the parameters the weights y in it."""
        super().load_state_dict(state_dict)
        self._share()
        for group in self.param_groups:
            group["train_mode"] = True  # False in what was saved inside `applied`
        for parameter, state in self.state.items():
            if POINT in state:
                parameter.copy_(state.pop(POINT))

    @contextmanager
    def applied(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """Set the parameters to their average x inside the `with` block.

        Afterwards they have the same bits as before, in the same tensors.

        parameters: those of this optimizer, by name.
        """
        moved = [p for p in parameters.values() if self.state.get(p)]
        for parameter in moved:
            self.state[parameter][POINT] = parameter.data
            parameter.data = parameter.data.clone()
        self.inner.eval()
        try:
            yield
        finally:
            for parameter in moved:
                parameter.data = self.state[parameter].pop(POINT)
            for group in self.param_groups:
                group["train_mode"] = True

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Take a step, and return what `closure` does, which computes the gradients first.

        Without any gradient, as after a step that was cancelled, nothing is counted.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if any(_has_gradients(group) for group in self.param_groups):
            self.inner.step()
        return loss


def _has_gradients(group: dict) -> bool:
    return any(parameter.grad is not None for parameter in group["params"])
