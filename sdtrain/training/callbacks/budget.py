"""How much of a run its looks may take: counted in network evaluations and never by the clock, so
that two runs of one configuration look at the same pictures on any machine.
"""

import math
from dataclasses import dataclass

import lightning.pytorch as L
import torch

from sdtrain.generation.drawing import Drawing
from sdtrain.generation.evaluations import evaluations_of
from sdtrain.models.modes import eval_mode
from sdtrain.training.datamodule import DataModule

TRAINING = 3
"""Evaluations that a training sample costs: forward, and twice that backward."""

IN_MID_RUN = 0.5
"""Part of what the run so far allows that looks in mid-run may take; the last have the rest."""

PAGE = 2e9
"""Multiplications for which a processor lays out, compresses and writes a sheet or a plot."""

SMALLEST = 2e7
"""A smaller network takes as long for a picture as one of so many multiplications."""


@dataclass(frozen=True)
class Costs:
    """In evaluations of the trained network on one picture, weighed by their multiplications.

    encode, decode: of one picture by a frozen autoencoder. page: of a sheet or a plot. ranks: that
    wait while one of them looks.
    """

    encode: float
    decode: float
    page: float
    ranks: int

    def drawing(self, module: L.LightningModule, drawing: Drawing, image_size: int) -> float:
        """Of one picture, from noise to pixels."""
        model = module.model
        shape = model.autoencoder.latent_shape(image_size)
        return evaluations_of(drawing, model.objective.schedule, shape) + self.decode


def measure_costs(module: L.LightningModule, data: DataModule, ranks: int) -> Costs:
    """By the multiplications of the layers on the first training picture."""
    batch = data.collate([data.train[(0, 0)]], [0], 1).to(module.device)
    with eval_mode(module), torch.no_grad():
        network, encoder, decoder = module.multiplications(batch)
    return Costs(encoder / network, decoder / network, PAGE / max(network, SMALLEST), ranks)


def fitting(allowed: float, one: float, wanted: int) -> int:
    """How many of `wanted` things that cost `one` each are allowed."""
    if allowed == math.inf:
        return wanted
    return max(0, min(wanted, int(allowed / one)))


class Budget:
    """What looks have taken of a run, and may still take.

    share: of the run's evaluations; None for no limit.
    """

    def __init__(self, share: float | None) -> None:
        self.share = share
        self.spent = 0.0

    def left(self, images_seen: int, last: bool) -> float:
        """Evaluations that the looks after `images_seen` images may take together."""
        if self.share is None:
            return math.inf
        allowed = self.share * TRAINING * images_seen * (1 if last else IN_MID_RUN)
        return max(0.0, allowed - self.spent)

    def take_all(self, images_seen: int) -> None:
        """What looks have taken so far is not known: as much as they might."""
        if self.share is not None:
            self.spent += self.left(images_seen, last=False)


def share_of(spent: float, images_seen: int) -> float:
    """What `spent` evaluations are of those that the run so far has taken."""
    return spent / (TRAINING * images_seen)
