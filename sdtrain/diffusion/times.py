"""The law by which training draws t."""

from torch import Tensor

from sdtrain.schedules import Schedule


class Uniform:
    """t uniform over the points of the schedule's table, or over all of [0, 1] with continuous=True.

    stratified is a proposal, not part of the law: the uniforms of one global batch are spread evenly over [0, 1), each
    still uniform by itself. They are made where the batch is made (sdtrain.data.draws), which reads this attribute.
    """

    def __init__(self, *, continuous: bool = False, stratified: bool = True) -> None:
        self.continuous, self.stratified = continuous, stratified

    def __call__(self, u: Tensor, schedule: Schedule) -> Tensor:
        """Uniforms u [B] in [0, 1) to times t [B], float64."""
        return u if self.continuous else schedule.training_time(u)
