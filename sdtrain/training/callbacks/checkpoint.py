"""Saves checkpoints between optimizer steps, and resumes from them exactly."""

from pathlib import Path

import lightning.pytorch as L

from sdtrain.config.schema import CheckpointSettings
from sdtrain.errors import UserError
from sdtrain.files import remove_leftovers
from sdtrain.runs.layout import RunFolder
from sdtrain.training.callbacks.ema import averaged_weights
from sdtrain.training.optimisation import OptimisedModule
from sdtrain.training.progress import Progress, window_ended
from sdtrain.training.stopping import Stopping


class Checkpoints(L.Callback):
    """Saves a checkpoint every `settings.every` images seen, at the end, and after a signal; see
    FolderIO for which ones are kept.

    It runs before the looks: the checkpoint of the last step is on the disk before the looks at the
    end begin.
    """

    def __init__(
        self,
        *,
        settings: CheckpointSettings,
        run_dir: Path,
        stopping: Stopping,
        progress: Progress,
    ) -> None:
        self.every = settings.every
        self.run = RunFolder(run_dir)
        self.stopping = stopping
        self.progress = progress
        self.saved_at = 0
        """Images seen at the newest checkpoint."""

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        # Ranks that torchrun started may each have another folder: the run's is rank 0's.
        self.run = RunFolder(Path(trainer.strategy.broadcast(str(self.run.path))))
        if trainer.is_global_zero:
            for folder in (self.run.path, self.run.checkpoints, self.run.samples):
                remove_leftovers(folder)

    def on_load_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict
    ) -> None:
        """Recompute Lightning's counters of steps and micro-batches from the images seen, for this
        run's number of ranks and accumulation.

        Raises UserError if the batch size does not divide the images seen.
        """
        state = checkpoint[type(trainer.datamodule).__qualname__]
        self.saved_at = state["images_seen"]
        batch_size = self.progress.batch_size
        steps, rest = divmod(state["images_seen"], batch_size)
        if rest:
            raise UserError(
                f"does not divide the {state['images_seen']} images that the checkpoint has seen",
                key="data.batch_size",
                value=batch_size,
                remedy="Keep the batch size that the run began with.",
            )
        rewrite_counters(checkpoint["loops"]["fit_loop"], steps, trainer.accumulate_grad_batches)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_index: int
    ) -> None:
        if not window_ended(trainer):
            return
        last = self.progress.ended
        signal_received = self.stopping.interrupted_by
        if last or signal_received or self.progress.is_due(self.every):
            self.save(trainer, module)
        if last or signal_received:
            trainer.strategy.checkpoint_io.wait(last=True)
        if signal_received and not last:
            self.stopping.raise_interrupted(trainer)

    def save(self, trainer: L.Trainer, module: OptimisedModule) -> None:
        """Save a checkpoint, unless there is one at this number of images. Must be called on all
        ranks: it has a barrier.

        The weights of a schedule-free optimizer are saved as their average.
        """
        if self.saved_at == self.progress.images_seen:
            return
        with averaged_weights(None, module):
            trainer.save_checkpoint(self.run.checkpoint(self.progress.images_seen).path)
        self.saved_at = self.progress.images_seen


def rewrite_counters(loop: dict, steps: int, accumulate: int) -> None:
    """Set the counters in Lightning's saved loop state to `steps` optimizer steps of `accumulate`
    micro-batches each.
    """
    micro_batches = steps * accumulate
    progress = loop["epoch_loop.batch_progress"]
    for part in (progress["total"], progress["current"]):
        # -1, because the checkpoint was saved within on_train_batch_end; Lightning expects it.
        lag = part["completed"] - part["processed"]
        part.update(
            ready=micro_batches,
            started=micro_batches,
            processed=micro_batches,
            completed=micro_batches + lag,
        )
    optimizer = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    for part in optimizer["step"].values():
        part.update(ready=steps, completed=steps)
