"""Express a schedule and a prediction as a scheduler of diffusers."""

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from sdtrain.diffusion.prediction import Epsilon, Flow, Prediction, V
from sdtrain.errors import UserError
from sdtrain.schedules import Schedule

LEAST_ALPHA = 0.01
"""Smallest alpha at t = 1 with which epsilon can be exported. diffusers bounds no x0, and the error
of a predicted epsilon is divided by alpha there."""

PREDICTION_TYPES = {Epsilon: "epsilon", V: "v_prediction"}
"""{class of a prediction: prediction_type of diffusers}."""


def scheduler_of(schedule: Schedule, prediction: Prediction) -> SchedulerMixin:
    """Return the scheduler that samples like sdtrain's ddim on the trailing grid.

    A schedule that preserves variance becomes a table of betas, the flow schedule flow sigmas.
    Raises UserError for what no scheduler of diffusers can express.
    """
    name = type(prediction).__name__.lower()
    if isinstance(prediction, Flow) or schedule.straight:
        return _flow_scheduler(schedule, prediction)
    if type(prediction) not in PREDICTION_TYPES:
        raise _cannot_be_expressed(f"prediction={name}")
    alpha = schedule.alpha_sigma(torch.tensor(1.0))[0].item()
    if isinstance(prediction, Epsilon) and alpha < LEAST_ALPHA:
        raise UserError(
            "The run cannot be exported with prediction=epsilon under "
            f"schedule={schedule.name}: alpha at t = 1 is {alpha:.2g}, below {LEAST_ALPHA}, and "
            "diffusers does not bound the x0 that is divided by it",
            key="checkpoint",
            remedy="Train with prediction=v.",
        )
    return DDIMScheduler(
        num_train_timesteps=schedule.num_timesteps,
        trained_betas=betas_of(schedule),
        prediction_type=PREDICTION_TYPES[type(prediction)],
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # not used by trailing, but StableDiffusionPipeline warns of any other
    )


def betas_of(schedule: Schedule) -> list[float]:
    """Return beta_i = 1 - alpha_i^2 / alpha_(i-1)^2 at the T timesteps, with alpha_(-1) = 1."""
    t = torch.linspace(0, 1, schedule.num_timesteps, dtype=torch.float64)
    alpha_bar = schedule.log_snr(t).sigmoid()
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    return (1 - alpha_bar / before).tolist()


def _flow_scheduler(schedule: Schedule, prediction: Prediction) -> SchedulerMixin:
    if not (isinstance(prediction, Flow) and schedule.straight):
        name = type(prediction).__name__.lower()
        raise _cannot_be_expressed(f"prediction={name} under schedule={schedule.name}")
    if schedule.name != "flow":
        raise _cannot_be_expressed(f"modifiers of schedule=flow ({schedule.name})")
    return DPMSolverMultistepScheduler(
        num_train_timesteps=schedule.num_timesteps,
        solver_order=1,
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        steps_offset=1,  # as above
    )


def _cannot_be_expressed(what: str) -> UserError:
    return UserError(
        f"The run cannot be exported: no scheduler of diffusers expresses {what}",
        key="checkpoint",
        remedy="Train with prediction=epsilon or prediction=v and a schedule that preserves "
        "variance, or with schedule=flow prediction=flow.",
    )
