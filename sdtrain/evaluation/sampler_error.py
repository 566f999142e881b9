"""Measure how far pictures of few steps are from those of many, to choose the number of steps."""

from sdtrain.config.schema import check_at_least
from sdtrain.errors import UserError
from sdtrain.evaluation.metric import Measurement, Metric, percent
from sdtrain.evaluation.subject import Subject
from sdtrain.generation.steps import compare_steps, draws_noise
from sdtrain.plots import draw_sampler_errors

KEY = "metrics.sampler_error"


class SamplerError(Metric):
    """Distance of pictures of few steps from the same pictures of many steps: mean and maximum.

    Args:
        steps: numbers of steps to measure; those that are not below the reference are left out.
        reference: number of steps of the pictures to compare with; the schedule's num_timesteps if
            that is less.
    """

    own_steps = True
    unit = "share of the pixels' range"
    higher_is_better = False

    def __init__(self, *, steps: list[int], reference: int = 1000) -> None:
        check_at_least(min(steps, default=0), 1, f"{KEY}.steps")
        check_at_least(reference, 2, f"{KEY}.reference")
        self.steps = steps
        self.reference = reference

    def check(self, subject: Subject) -> None:
        if draws_noise(subject.drawing):
            raise UserError(
                "compares pictures that start from the same noise, but sampler "
                f"{subject.drawing.sampler_name} draws fresh noise at each step",
                key="metrics",
                value="sampler_error",
                remedy="Choose sampler=ddim, or another metric.",
            )
        if len(self.steps_of(subject)) < 2:
            timesteps = subject.model.objective.schedule.num_timesteps
            raise UserError(
                f"compares {min(self.steps)} steps and more with {self.reference}, but this run "
                f"has schedule.num_timesteps={timesteps}",
                key="metrics",
                value="sampler_error",
                remedy="Choose another metric.",
            )

    def steps_of(self, subject: Subject) -> list[int]:
        """Return the numbers of steps to draw with, the reference last."""
        reference = min(self.reference, subject.model.objective.schedule.num_timesteps)
        return [*(number for number in self.steps if number < reference), reference]

    def measure(self, subject: Subject) -> Measurement:
        requests = subject.requests
        titles = [request.title(subject.model.conditioner) for request in requests]
        comparison = compare_steps(
            subject.model, requests, subject.drawing, subject.image_size, self.steps_of(subject)
        )
        sheet, curve = draw_sampler_errors(comparison.pictures, comparison.distances, titles)
        columns = {"mean": {}, "largest": {}}
        for number, distances in comparison.distances.items():
            columns["mean"][f"{number} steps"] = distances.mean().item()
            columns["largest"][f"{number} steps"] = distances.max().item()
        return Measurement(columns, {"": sheet, "curve": curve})

    def format(self, value: float) -> str:
        return percent(value)
