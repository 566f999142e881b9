"""How far pictures of few steps are from those of many, so that "50 steps" is a measured choice."""

from torch import Tensor

from sdtrain.config.schema import at_least
from sdtrain.errors import UserError
from sdtrain.evaluation.metric import Measurement, Metric, percent
from sdtrain.evaluation.subject import Subject
from sdtrain.generation.steps import compare_steps, draws_noise
from sdtrain.plots import sampler_errors

KEY = "metrics.sampler_error"


class SamplerError(Metric):
    """Distance of pictures of few steps from the same ones of many: mean and largest of all.

    Args:
        steps: the numbers that are measured; those that are not below the reference are left out.
        reference: steps of the pictures they are compared with, or the schedule's num_timesteps
            where that is less.
    """

    own_steps = True
    unit = "share of the pixels' range"
    higher_is_better = False

    def __init__(self, *, steps: list[int], reference: int = 1000) -> None:
        at_least(min(steps, default=0), 1, f"{KEY}.steps")
        at_least(reference, 2, f"{KEY}.reference")
        self.steps = steps
        self.reference = reference

    def check(self, subject: Subject) -> None:
        if draws_noise(subject.drawing):
            raise UserError(
                "follows the same noise through more steps, and sampler "
                f"{subject.drawing.sampler_name} draws fresh noise at each",
                key="metrics",
                value="sampler_error",
                remedy="Choose sampler=ddim.",
            )
        if len(self.steps_of(subject)) < 2:
            timesteps = subject.model.objective.schedule.num_timesteps
            raise UserError(
                f"compares {min(self.steps)} steps and more with {self.reference}; this run has "
                f"schedule.num_timesteps={timesteps}",
                key="metrics",
                value="sampler_error",
                remedy="Choose another metric.",
            )

    def steps_of(self, subject: Subject) -> list[int]:
        """The steps that are drawn, the reference last."""
        reference = min(self.reference, subject.model.objective.schedule.num_timesteps)
        return [*(steps for steps in self.steps if steps < reference), reference]

    def measure(self, subject: Subject) -> Measurement:
        requests = subject.requests
        titles = [request.title(subject.reads) for request in requests]
        compared = compare_steps(
            subject.model, requests, subject.drawing, subject.image_size, self.steps_of(subject)
        )
        sheet, curve = sampler_errors(compared.pictures, compared.distances, titles)
        columns = {
            "mean": _by_steps(compared.distances, Tensor.mean),
            "largest": _by_steps(compared.distances, Tensor.max),
        }
        return Measurement(columns, {"": sheet, "curve": curve})

    def format(self, value: float) -> str:
        return percent(value)


def _by_steps(distances: dict[int, Tensor], measure) -> dict[str, float]:
    return {f"{steps} steps": measure(each).item() for steps, each in distances.items()}
