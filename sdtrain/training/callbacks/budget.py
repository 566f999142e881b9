"""The budget of the looks (sampling and validation during training).

It is counted in network evaluations and never by the clock, so that two runs of one configuration
sample and validate the same pictures on any machine.
"""

import math
from dataclasses import dataclass

import lightning.pytorch as L
import torch

from sdtrain.generation.count_evaluations import count_evaluations
from sdtrain.generation.drawing import Drawing
from sdtrain.models.modes import eval_mode
from sdtrain.training.datamodule import DataModule
from sdtrain.types import PictureData

TRAINING = 3
"""Evaluations that a training sample costs: one forward, and twice as much backward."""

IN_MID_RUN = 0.5
"""Fraction of the budget that looks may use before the end of the run; the last ones get the rest.
"""

AT_START = 0.2
"""Fraction of the whole run's budget that looks may use before the first step."""

PAGE = 2e9
"""Cost of laying out, compressing and writing a sheet of pictures or a plot, in multiplications."""

SMALLEST = 2e7
"""Multiplications per picture below which a smaller network is not faster."""


@dataclass(frozen=True)
class Costs:
    """Costs in units of one evaluation of the trained network on one picture, by the number of
    multiplications.

    encode, decode: one picture through the frozen autoencoder. page: a sheet of pictures or a
    plot. ranks: the number of ranks, which all wait while one of them works.
    """

    encode: float
    decode: float
    page: float
    ranks: int

    def drawing(self, module: L.LightningModule, drawing: Drawing, image_size: int) -> float:
        """Return the cost of sampling one picture, from noise to pixels."""
        model = module.model
        shape = model.autoencoder.latent_shape(image_size)
        return count_evaluations(drawing, model.objective.schedule, shape) + self.decode


def measure_costs(module: L.LightningModule, data: DataModule, ranks: int) -> Costs:
    """Measure the costs: count the multiplications of the layers on the first training picture."""
    batch = data.collate([data.train[(0, 0)]], [0], 1).to(module.device)
    with eval_mode(module), torch.no_grad():
        network, encoder, decoder = module.multiplications(batch)
    return Costs(encoder / network, decoder / network, PAGE / max(network, SMALLEST), ranks)


def affordable_count(allowed: float, cost_each: float, wanted: int) -> int:
    """Return how many of `wanted` things that cost `cost_each` fit into `allowed`."""
    if allowed == math.inf:
        return wanted
    return max(0, min(wanted, int(allowed / cost_each)))


def held_out_count(num_images: int, data: PictureData | None) -> int:
    """Return how many held-out pictures there are for a look that wants `num_images`.

    data: None if the settings are only checked.
    """
    return num_images if data is None else min(num_images, len(data.split("validation")))


class Budget:
    """The evaluations that looks have spent in a run, and may still spend.

    share: their limit as a fraction of the run's evaluations; None for no limit.
    """

    def __init__(self, share: float | None) -> None:
        self.share = share
        self.spent = 0.0

    def left(self, images_seen: int, last: bool) -> float:
        """Return how many evaluations the looks at `images_seen` images may spend together."""
        if self.share is None:
            return math.inf
        allowed = self.share * TRAINING * images_seen * (1 if last else IN_MID_RUN)
        return max(0.0, allowed - self.spent)

    def left_at_start(self, max_images: int) -> float:
        """Return how many network evaluations the looks before the first step may spend together.

        max_images: how many images the run will have seen at its end.
        """
        if self.share is None:
            return math.inf
        return self.share * TRAINING * max_images * AT_START

    def assume_all_spent(self, images_seen: int) -> None:
        """Assume that the looks so far have spent all they could, if it is not known."""
        if self.share is not None:
            self.spent += self.left(images_seen, last=False)


def share_spent(spent: float, images_seen: int) -> float:
    """Return `spent` evaluations as a fraction of the training evaluations so far."""
    return spent / (TRAINING * images_seen)
