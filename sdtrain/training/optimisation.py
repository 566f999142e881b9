"""How weights move: learning rate by images seen, gradient clipping, and no step at all on a gradient that is not finite."""

import math
from collections.abc import Callable, Iterable

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sdtrain.errors import DivergedError


def not_negative(warmup_images: int) -> int:
    if warmup_images < 0:
        raise ValueError(f"lr_schedule.warmup_images={warmup_images} must be at least 0.")
    return warmup_images


class Cosine:
    """Learning rate factor: rises linearly over warmup_images, then falls along half a cosine to final_factor at the end of the run."""

    def __init__(self, *, warmup_images: int, final_factor: float = 0.0) -> None:
        self.warmup_images, self.final_factor = not_negative(warmup_images), final_factor

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
    """The optimizer with its learning rate and clipping. It has no state of its own: the rate is a function of images seen.

    Args:
        optimizer: parameters -> torch optimizer.
        lr_schedule: (images_seen, max_images) -> factor on lr.
        max_images: length of the run in pictures.
        gradient_clip: largest norm of the gradient over all parameters.
        max_skipped: steps on a loss or gradient that is not finite that may be left out. None: the first one ends the run, which the host
            learns when it next reads numbers, while the device has masked the step; with a number the host waits for each step's norm.
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
        self.make, self.lr_schedule, self.max_images, self.gradient_clip, self.max_skipped = (
            optimizer,
            lr_schedule,
            max_images,
            gradient_clip,
            max_skipped,
        )
        self.skipped, self.stepped, self.judged = 0, True, None

    def configure(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        optimizer = self.make(parameters)
        self.settings = [
            {k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups
        ]
        return optimizer

    def set_learning_rate(
        self, optimizer: Optimizer, images_seen: int, batch_size: int = 0
    ) -> None:
        """images_seen: with the step that is about to be taken, so that the first step of a warm-up moves something. Those of steps that were
        left out do not count; batch_size: of one step.

        Every setting is written anew: a resumed optimizer brings the old run's along, and would silently keep them.
        """
        factor = self.lr_schedule(images_seen - self.skipped * batch_size, self.max_images)
        for group, settings in zip(optimizer.param_groups, self.settings, strict=True):
            group.update(settings, lr=settings["lr"] * factor)

    def clip(self, optimizer: Optimizer, loss: Tensor) -> Tensor:
        """Clips the gradients in place and returns their norm before, a scalar on the device.

        A norm, or a loss, that is not finite cancels the step and makes the norm NaN; both are kept as they were in `judged`. loss: the
        step's, the same on all ranks, as the gradients are; it may be infinite where they are not.
        """
        parameters = [
            p for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        norm = nn.utils.clip_grad_norm_(parameters, self.gradient_clip, foreach=True)
        self.judged = loss, norm
        bad = (~(norm + loss).isfinite()).float()
        if self.max_skipped is not None:
            self.stepped = not bad.item()
            self.skipped += not self.stepped
            if self.skipped > self.max_skipped:
                raise DivergedError(
                    f"{self.skipped} steps had a loss or gradient that was not finite, and trainer.max_skipped={self.max_skipped} may be left out. "
                    f"Lower optimizer.lr (now {self.settings[0]['lr']:g}), or look at the data."
                )
        if all(group.get("fused") for group in optimizer.param_groups):
            optimizer.found_inf = bad  # a fused optimizer then skips the step on the device: the host need not wait for the norm
        elif bad.item():
            for parameter in parameters:
                parameter.grad = None
        return torch.where(bad.bool(), torch.full_like(norm, math.nan), norm)


class OptimisedModule(L.LightningModule):
    """What both modules leave to their `optimisation`; training_step adds the loss of each micro-batch to window_loss."""

    optimisation: Optimisation

    def configure_gradient_clipping(
        self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None
    ) -> None:
        data, loss = (
            self.trainer.datamodule,
            self.trainer.strategy.reduce(self.window_loss, reduce_op="sum"),
        )
        self.optimisation.set_learning_rate(optimizer, data.images_seen, data.batch_size)
        self.norm, self.window_loss = self.optimisation.clip(optimizer, loss), 0.0

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["skipped_steps"] = self.optimisation.skipped

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.optimisation.skipped = checkpoint.get("skipped_steps", 0)
