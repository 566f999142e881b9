"""Exponential moving average of every trained parameter, kept in float32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """weights = decay weights + (1 - decay) parameters after every optimizer step.

    decay_n = min(decay, (1 + n) / (10 + n)) after n steps: the start, which is noise, is forgotten quickly.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"callbacks.ema.decay={decay:g} must lie in [0, 1)")
        self.decay, self.steps = decay, 0
        self.weights = {name: p.detach().float().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: dict[str, nn.Parameter]) -> None:
        self.steps += 1
        rate = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(
            list(self.weights.values()),
            [parameters[name].detach().float() for name in self.weights],
            rate,
        )

    @contextmanager
    def applied(self, parameters: dict[str, nn.Parameter]) -> Iterator[None]:
        """The parameters hold the average inside the block and their own values, the very same tensors, after it."""
        own = {name: p.data for name, p in parameters.items()}
        try:
            for name, p in parameters.items():
                p.data = self.weights[name].to(p.dtype)
            yield
        finally:
            for name, p in parameters.items():
                p.data = own[name]

    def state_dict(self) -> dict[str, int | dict[str, Tensor]]:
        return {"steps": self.steps, "weights": self.weights}

    def load_state_dict(self, state: dict) -> None:
        if missing := self.weights.keys() ^ state["weights"].keys():
            raise ValueError(
                f"the stored average and the model differ in {len(missing)} parameters, the first is {sorted(missing)[0]}"
            )
        if different := [
            name
            for name, value in state["weights"].items()
            if value.shape != self.weights[name].shape
        ]:
            raise ValueError(
                f"the stored average of {different[0]} has another shape than the model's"
            )
        self.steps = state["steps"]
        for name, value in state["weights"].items():
            self.weights[name].copy_(value)
