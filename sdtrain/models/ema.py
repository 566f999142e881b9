"""Exponential moving average (EMA) of every trained parameter, kept in float32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sdtrain.errors import UserError


class EMA:
    """Averages weights: weights = decay weights + (1 - decay) parameters after each optimizer step.

    decay_n = min(decay, (1 + n) / (10 + n)) after n steps, so that the random initial weights are
    forgotten quickly. Raises UserError for a decay outside [0, 1).
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        if not 0 <= decay < 1:
            raise UserError("must lie in [0, 1)", key="callbacks.ema.decay", value=decay)
        self.decay = decay
        self.steps = 0
        self.weights = {name: p.detach().float().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: dict[str, nn.Parameter]) -> None:
        """Add the parameters to the average, after an optimizer step."""
        self.steps += 1
        rate = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        current = [parameters[name].detach().float() for name in self.weights]
        torch._foreach_lerp_(list(self.weights.values()), current, rate)

    @contextmanager
    def applied(self, parameters: dict[str, nn.Parameter]) -> Iterator[None]:
        """Set the parameters to the average inside the `with` block.

        Afterwards they have their own values again, in the same tensors as before.
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
        """Return the average and the number of its steps."""
        return {"steps": self.steps, "weights": self.weights}

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned, whose tensors are taken over and not copied.

        Raises ValueError if names or shapes differ.
        """
        differing = self.weights.keys() ^ state["weights"].keys()
        if differing:
            raise ValueError(
                f"the stored average and the model differ in {len(differing)} parameters, "
                f"the first is {min(differing)}"
            )
        for name, value in state["weights"].items():
            if value.shape != self.weights[name].shape:
                raise ValueError(f"the stored average of {name} has another shape than the model's")
        self.steps = state["steps"]
        for name, value in state["weights"].items():
            self.weights[name] = value.to(self.weights[name])
