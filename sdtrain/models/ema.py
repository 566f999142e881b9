"""Exponential moving average of every trained parameter, kept in float32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sdtrain.errors import UserError


class EMA:
    """weights = decay weights + (1 - decay) parameters after every optimizer step.

    decay_n = min(decay, (1 + n) / (10 + n)) after n steps: the start, which is noise, is forgotten
    quickly.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        if not 0 <= decay < 1:
            raise UserError("must lie in [0, 1)", key="callbacks.ema.decay", value=decay)
        self.decay = decay
        self.steps = 0
        self.weights = {name: p.detach().float().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: dict[str, nn.Parameter]) -> None:
        """Takes in the parameters after an optimizer step."""
        self.steps += 1
        rate = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        current = [parameters[name].detach().float() for name in self.weights]
        torch._foreach_lerp_(list(self.weights.values()), current, rate)

    @contextmanager
    def applied(self, parameters: dict[str, nn.Parameter]) -> Iterator[None]:
        """The parameters hold the average inside the block.

        After it they hold their own values again, the very same tensors.
        """
        own = {name: p.data for name, p in parameters.items()}
        try:
            for name, p in parameters.items():
                p.data = self.weights[name].to(p.dtype)
            yield
        finally:
            for name, p in parameters.items():
                p.data = own[name]

    def state_dict(self) -> dict[str, int | dict[str, Tensor]]:
        """The average and how many steps it has seen."""
        return {"steps": self.steps, "weights": self.weights}

    def load_state_dict(self, state: dict) -> None:
        """The inverse of `state_dict`. Raises ValueError where names or shapes differ."""
        if missing := self.weights.keys() ^ state["weights"].keys():
            raise ValueError(
                f"the stored average and the model differ in {len(missing)} parameters, "
                f"the first is {min(missing)}"
            )
        for name, value in state["weights"].items():
            if value.shape != self.weights[name].shape:
                raise ValueError(f"the stored average of {name} has another shape than the model's")
        self.steps = state["steps"]
        for name, value in state["weights"].items():
            self.weights[name].copy_(value)
