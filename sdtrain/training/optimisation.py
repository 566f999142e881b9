"""Optimizer steps: learning rate as a function of images seen, gradient clipping, and skipping of
steps whose loss or gradient is not finite.
"""

import math
import random
from collections.abc import Callable, Collection, Iterable, Mapping

import lightning.pytorch as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sdtrain.errors import DivergedError, UserError
from sdtrain.models.modes import begin_training
from sdtrain.training.optimizers.schedule_free import ScheduleFree
from sdtrain.training.parameter_groups import GroupSettings, group_parameters, matrix_names
from sdtrain.training.progress import Progress, StepResult
from sdtrain.types import Batch


def check_warmup(warmup_images: int) -> None:
    """Raise UserError if the length of a warm-up is negative."""
    if warmup_images < 0:
        raise UserError("must be at least 0", key="lr_schedule.warmup_images", value=warmup_images)


class Cosine:
    """Learning rate factor: rises linearly over warmup_images, then falls along half a cosine to
    final_factor at the end of the run.
    """

    def __init__(self, *, warmup_images: int, final_factor: float = 0.0) -> None:
        check_warmup(warmup_images)
        self.warmup_images = warmup_images
        self.final_factor = final_factor

    def __call__(self, images_seen: int, max_images: int) -> float:
        if images_seen < self.warmup_images:
            return images_seen / self.warmup_images
        decay_images = max(1, max_images - self.warmup_images)
        progress = min(1.0, (images_seen - self.warmup_images) / decay_images)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.final_factor + (1 - self.final_factor) * cosine


class Constant:
    """Learning rate factor: rises linearly over warmup_images, then stays 1."""

    def __init__(self, *, warmup_images: int = 0) -> None:
        check_warmup(warmup_images)
        self.warmup_images = warmup_images

    def __call__(self, images_seen: int, max_images: int) -> float:
        if self.warmup_images == 0:
            return 1.0
        return min(1.0, images_seen / self.warmup_images)


class Optimisation:
    """The optimizer with its learning rate schedule and gradient clipping.

    It has no state of its own: the learning rate is a function of images seen.

    Args:
        optimizer: parameter groups -> torch optimizer.
        lr_schedule: (images_seen, max_images) -> factor on lr.
        max_images: length of the run in images.
        gradient_clip: largest norm of the gradient over all parameters.
        groups: learning rates and weight decay of groups of parameters.
        max_skipped: how many steps may be skipped because their loss or gradient is not finite.
            With a number, the host waits for the gradient norm of each step. With None, the first
            such step ends the run. A fused AdamW then masks the step on the device, and the host
            finds out when it next reads the metrics; for the other optimizers it waits.
    """

    def __init__(
        self,
        *,
        optimizer: Callable[[Iterable[dict]], Optimizer],
        lr_schedule: Callable[[int, int], float],
        max_images: int,
        gradient_clip: float,
        groups: GroupSettings | None = None,
        max_skipped: int | None = None,
    ) -> None:
        self.make_optimizer = optimizer
        self.lr_schedule = lr_schedule
        self.max_images = max_images
        self.gradient_clip = gradient_clip
        self.groups = groups or GroupSettings()
        self.max_skipped = max_skipped
        self.group_settings: list[dict] = []

    @property
    def lr(self) -> float:
        """The peak learning rate of the first parameter group."""
        return self.group_settings[0]["lr"]

    def configure(
        self, parameters: Mapping[str, nn.Parameter], matrices: Collection[str] = ()
    ) -> Optimizer:
        """Create the optimizer of parameters by name, and remember the settings of its groups.

        matrices: names of the parameters that are weights of linear layers, which an optimizer with
        `splits_matrices` treats apart. Raises UserError for a setting of `groups` that has no
        effect.
        """
        target = getattr(self.make_optimizer, "func", self.make_optimizer)  # of a partial
        splits = getattr(target, "splits_matrices", False)
        groups = group_parameters(parameters, self.groups, matrices if splits else None)
        optimizer = self.make_optimizer(groups)
        no_settings = {"params", *getattr(optimizer, "counters", ())}
        self.group_settings = []
        for group in optimizer.param_groups:
            settings = {key: value for key, value in group.items() if key not in no_settings}
            self.group_settings.append(settings)
        return optimizer

    def set_learning_rate(self, optimizer: Optimizer, images_trained: int) -> None:
        """Set the learning rate, and reset the other settings of the parameter groups to those that
        are configured.

        A resumed optimizer would otherwise silently keep the settings of its checkpoint.

        images_trained: includes the step that is about to be taken, so that the first step of a
        warm-up has a learning rate above 0; excludes skipped steps, whose gradient was not finite.
        """
        factor = self.lr_schedule(images_trained, self.max_images)
        for group, settings in zip(optimizer.param_groups, self.group_settings, strict=True):
            group.update(settings, lr=settings["lr"] * factor)

    def clip(self, optimizer: Optimizer, loss: Tensor) -> StepResult:
        """Clip the gradients in place, and cancel the step if their norm or the loss is not finite.

        loss: the step's loss, the same on all ranks, as the gradients are. It may be infinite when
        the gradients are not.
        """
        parameters = []
        for group in optimizer.param_groups:
            parameters += [p for p in group["params"] if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(parameters, self.gradient_clip, foreach=True)
        not_finite = (~(norm + loss).isfinite()).float()
        applied = True
        if self.max_skipped is not None:
            applied = not not_finite.item()
        if all(group.get("fused") for group in optimizer.param_groups):
            # Makes a fused optimizer skip the step on the device: the host need not wait for the
            # norm.
            optimizer.found_inf = not_finite
        elif not_finite.item():
            for parameter in parameters:
                parameter.grad = None
        shown_norm = torch.where(not_finite.bool(), torch.full_like(norm, math.nan), norm)
        return StepResult(loss, norm, shown_norm, applied)

    def check_skipped(self, skipped_steps: int) -> None:
        """Raise DivergedError if more than max_skipped steps were skipped."""
        if self.max_skipped is None or skipped_steps <= self.max_skipped:
            return
        raise DivergedError(
            f"{skipped_steps} steps had a loss or gradient that was not finite, and only "
            f"trainer.max_skipped={self.max_skipped} may be skipped",
            key="optimizer.lr",
            remedy=f"Lower optimizer.lr (now {self.lr:g}), or check the data.",
        )


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the global random generators of Python, numpy and torch (CPU and `device`).

    Layers such as dropout draw from them. torch.manual_seed is avoided, because it formats a stack
    trace at each call while CUDA is not initialized, which is slow.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
    np.random.seed(seed % (1 << 32))
    random.seed(seed)


class OptimisedModule(L.LightningModule):
    """Base class of the two LightningModules: optimizer, learning rate, clipping and losses.

    A subclass sets `optimisation` and the run's `progress` in its constructor, and calls
    `record_losses` in each training_step.
    """

    optimisation: Optimisation
    progress: Progress
    schedule_free: ScheduleFree | None = None
    """The optimizer, if it averages the weights itself."""
    starts_optimizer_anew = False
    """Whether the optimizer's state in a checkpoint is that of another optimizer."""
    _window_loss: Tensor | float = 0.0

    def trained(self) -> dict[str, nn.Parameter]:
        """Return every parameter that is trained, by name."""
        raise NotImplementedError

    def make_optimizer(self) -> Optimizer:
        """Create the optimizer of the trained parameters. Raises UserError and torch's errors."""
        parameters = self.trained()
        return self.optimisation.configure(parameters, matrix_names(self, parameters))

    def on_fit_start(self) -> None:
        begin_training(self)

    def on_train_batch_start(self, batch: Batch, batch_index: int) -> None:
        seed_generators(batch.network_seed, self.device)

    def record_losses(self, batch: Batch, per_sample: Tensor, times: Tensor | None) -> Tensor:
        """Store the losses [B] and times [B] of a micro-batch in `progress`; return the mean loss.

        Does not use self.log, which would make the host wait for the device.
        """
        self.progress.images_seen = batch.stream_end
        self.progress.per_sample = per_sample.detach()
        self.progress.times = times
        self._window_loss = self._window_loss + self.progress.per_sample.sum()
        return per_sample.mean()

    def configure_optimizers(self) -> Optimizer:
        optimizer = self.make_optimizer()
        if isinstance(optimizer, ScheduleFree):
            self.schedule_free = optimizer
        return optimizer

    def configure_gradient_clipping(
        self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None
    ) -> None:
        progress = self.progress
        loss = self.trainer.strategy.reduce(self._window_loss, reduce_op="sum")
        images_skipped = progress.skipped_steps * progress.batch_size
        self.optimisation.set_learning_rate(optimizer, progress.images_seen - images_skipped)
        progress.step = self.optimisation.clip(optimizer, loss)
        progress.skipped_steps += not progress.step.applied
        self.optimisation.check_skipped(progress.skipped_steps)
        self._window_loss = 0.0

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["skipped_steps"] = self.progress.skipped_steps

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.progress.skipped_steps = checkpoint.get("skipped_steps", 0)
        if self.starts_optimizer_anew:
            checkpoint["optimizer_states"] = [self.make_optimizer().state_dict()]
