"""Keeps an exponential moving average (EMA) of the trained weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as L

from sdtrain.models.ema import EMA
from sdtrain.training.optimisation import OptimisedModule
from sdtrain.training.progress import window_ended


class EMACallback(L.Callback):
    """Updates the EMA of every trained parameter after each optimizer step. Sampling and validation
    use `average`.

    decay: decay of the average per optimizer step.
    """

    def __init__(self, *, decay: float) -> None:
        self.decay = decay
        self.average: EMA | None = None
        self._loaded: dict | None = None
        EMA({}, decay)  # raises at once if the decay is out of range

    @property
    def state_key(self) -> str:
        return "ema"

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.average = EMA(module.trained(), self.decay)
        if self._loaded is not None:
            self.average.load_state_dict(self._loaded)
            self._loaded = None

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_index: int
    ) -> None:
        if window_ended(trainer) and module.progress.step.applied:
            self.average.update(module.trained())

    def state_dict(self) -> dict:
        return self.average.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self._loaded = state


@contextmanager
def averaged_weights(ema: EMACallback | None, module: OptimisedModule) -> Iterator[None]:
    """Give the module its averaged weights within the `with` block: those of `ema`, or if that is
    None those of a schedule-free optimizer. Without either, the module keeps its own.
    """
    average = module.schedule_free if ema is None else ema.average
    if average is None:
        yield
        return
    with average.applied(module.trained()):
        yield
