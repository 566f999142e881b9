"""When callbacks act: between optimizer steps, every so many images seen."""

import lightning.pytorch as L


def window_ended(trainer: L.Trainer) -> bool:
    """Whether the micro-batch that just ended was the last of its accumulation window, so that the optimizer has stepped."""
    return not trainer.fit_loop._should_accumulate()


def ended(trainer: L.Trainer, module: L.LightningModule) -> bool:
    """Whether the optimizer step that just ended was the last: by the budget of images, or because the time is up."""
    return trainer.datamodule.images_seen >= min(
        module.optimisation.max_images, trainer.datamodule.ends_at
    )


def due(every: int, trainer: L.Trainer) -> bool:
    """Whether the optimizer step that just ended crossed a multiple of `every` images seen. every = 0 is never."""
    data = trainer.datamodule
    return every > 0 and data.images_seen // every > (data.images_seen - data.batch_size) // every
