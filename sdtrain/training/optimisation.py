"""How weights move: learning rate by images seen, gradient clipping, and no step at all on a
gradient that is not finite.
"""

import math
import random
from collections.abc import Callable, Iterable

import lightning.pytorch as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sdtrain.errors import DivergedError, UserError
from sdtrain.models.modes import begin_training
from sdtrain.training.progress import Progress, StepResult
from sdtrain.types import Batch


def not_negative(warmup_images: int) -> int:
    if warmup_images < 0:
        raise UserError("must be at least 0", key="lr_schedule.warmup_images", value=warmup_images)
    return warmup_images


class Cosine:
    """Learning rate factor: rises linearly over warmup_images, then falls along half a cosine to
    final_factor at the end of the run.
    """

    def __init__(self, *, warmup_images: int, final_factor: float = 0.0) -> None:
        self.warmup_images = not_negative(warmup_images)
        self.final_factor = final_factor

    def __call__(self, images_seen: int, max_images: int) -> float:
        if images_seen < self.warmup_images:
            return images_seen / self.warmup_images
        share = min(
            1.0, (images_seen - self.warmup_images) / max(1, max_images - self.warmup_images)
        )
        return self.final_factor + (1 - self.final_factor) * 0.5 * (1 + math.cos(math.pi * share))


class Constant:
    """Learning rate factor: rises linearly over warmup_images, then stays 1."""

    def __init__(self, *, warmup_images: int = 0) -> None:
        self.warmup_images = not_negative(warmup_images)

    def __call__(self, images_seen: int, max_images: int) -> float:
        return min(1.0, images_seen / self.warmup_images) if self.warmup_images else 1.0


class Optimisation:
    """The optimizer with its learning rate and clipping. It has no state of its own: the rate is a
    function of images seen.

    Args:
        optimizer: parameters -> torch optimizer.
        lr_schedule: (images_seen, max_images) -> factor on lr.
        max_images: length of the run in pictures.
        gradient_clip: largest norm of the gradient over all parameters.
        max_skipped: steps on a loss or gradient that is not finite that may be left out. None: the
            first one ends the run, which the host learns when it next reads numbers, while the
            device has masked the step; with a number the host waits for each step's norm.
    """

    def __init__(
        self,
        *,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        lr_schedule: Callable[[int, int], float],
        max_images: int,
        gradient_clip: float,
        max_skipped: int | None = None,
    ) -> None:
        self.make_optimizer = optimizer
        self.lr_schedule = lr_schedule
        self.max_images = max_images
        self.gradient_clip = gradient_clip
        self.max_skipped = max_skipped
        self.group_settings: list[dict] = []

    @property
    def lr(self) -> float:
        """The learning rate at its peak, of the first group."""
        return self.group_settings[0]["lr"]

    def configure(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        optimizer = self.make_optimizer(parameters)
        self.group_settings = []
        for group in optimizer.param_groups:
            settings = {key: value for key, value in group.items() if key != "params"}
            self.group_settings.append(settings)
        return optimizer

    def set_learning_rate(self, optimizer: Optimizer, images_trained: int) -> None:
        """images_trained: with the step that is about to be taken, so that the first step of a
        warm-up moves something; without those of steps that were left out.

        Every setting is written anew: a resumed optimizer brings the old run's along, and would
        silently keep them.
        """
        factor = self.lr_schedule(images_trained, self.max_images)
        for group, settings in zip(optimizer.param_groups, self.group_settings, strict=True):
            group.update(settings, lr=settings["lr"] * factor)

    def clip(self, optimizer: Optimizer, loss: Tensor) -> StepResult:
        """Clips the gradients in place, and cancels the step where their norm, or the loss, is not
        finite.

        loss: the step's, the same on all ranks, as the gradients are; it may be infinite where they
        are not.
        """
        parameters = []
        for group in optimizer.param_groups:
            parameters += [p for p in group["params"] if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(parameters, self.gradient_clip, foreach=True)
        bad = (~(norm + loss).isfinite()).float()
        applied = True
        if self.max_skipped is not None:
            applied = not bad.item()
        if all(group.get("fused") for group in optimizer.param_groups):
            # A fused optimizer then skips the step on the device: the host need not wait for the
            # norm.
            optimizer.found_inf = bad
        elif bad.item():
            for parameter in parameters:
                parameter.grad = None
        shown_norm = torch.where(bad.bool(), torch.full_like(norm, math.nan), norm)
        return StepResult(loss, norm, shown_norm, applied)

    def check_skipped(self, skipped_steps: int) -> None:
        """Raises DivergedError where more steps were left out than max_skipped."""
        if self.max_skipped is None or skipped_steps <= self.max_skipped:
            return
        raise DivergedError(
            f"{skipped_steps} steps had a loss or gradient that was not finite, and "
            f"trainer.max_skipped={self.max_skipped} may be left out",
            key="optimizer.lr",
            remedy=f"Lower optimizer.lr (now {self.lr:g}), or look at the data.",
        )


def seed_generators(seed: int, device: torch.device) -> None:
    """Sets the global generators, from which a network draws by itself: torch's on the CPU and on
    `device`, numpy's and Python's.

    torch.manual_seed would do the same for torch, but where CUDA is not in use it formats a stack
    trace at each call.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
    np.random.seed(seed % (1 << 32))
    random.seed(seed)


class OptimisedModule(L.LightningModule):
    """What both modules leave to their `optimisation`.

    A subclass sets `optimisation` and the run's `progress` as it is made, and calls `note_losses`
    in each training_step.
    """

    optimisation: Optimisation
    progress: Progress
    _window_loss: Tensor | float = 0.0

    def trained(self) -> dict[str, nn.Parameter]:
        """Every parameter that training moves, by name."""
        raise NotImplementedError

    def on_fit_start(self) -> None:
        begin_training(self)

    def on_train_batch_start(self, batch: Batch, batch_index: int) -> None:
        seed_generators(batch.network_seed, self.device)

    def note_losses(self, batch: Batch, per_sample: Tensor, times: Tensor | None) -> Tensor:
        """Writes down what a micro-batch came to, and returns its mean loss. No self.log: it would
        wait for the host.
        """
        self.progress.images_seen = batch.stream_end
        self.progress.per_sample = per_sample.detach()
        self.progress.times = times
        self._window_loss = self._window_loss + self.progress.per_sample.sum()
        return per_sample.mean()

    def configure_optimizers(self) -> Optimizer:
        return self.optimisation.configure(self.trained().values())

    def configure_gradient_clipping(
        self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None
    ) -> None:
        progress = self.progress
        loss = self.trainer.strategy.reduce(self._window_loss, reduce_op="sum")
        left_out = progress.skipped_steps * progress.batch_size
        self.optimisation.set_learning_rate(optimizer, progress.images_seen - left_out)
        progress.step = self.optimisation.clip(optimizer, loss)
        progress.skipped_steps += not progress.step.applied
        self.optimisation.check_skipped(progress.skipped_steps)
        self._window_loss = 0.0

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["skipped_steps"] = self.progress.skipped_steps

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.progress.skipped_steps = checkpoint.get("skipped_steps", 0)
