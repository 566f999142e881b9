"""What happens to a run of the default experiment in the tests: called in its processes, before the
command begins.

The fixture `train` (tests/training/conftest.py) hands on such a call as before="CALL()", evaluated
in here.
"""

import contextlib
import itertools
import math
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from sdtrain import files
from sdtrain.runs import checkpoint as checkpoint_folder
from sdtrain.runs.manifest import list_checkpoints
from sdtrain.signals import Signals
from sdtrain.training import checkpoint_io
from sdtrain.training.callbacks import sample_grid
from sdtrain.training.callbacks.metrics_log import MetricsLog
from sdtrain.training.datamodule import RowsWithOrdinals
from sdtrain.training.diffusion_module import DiffusionModule
from sdtrain.training.optimisation import Optimisation
from sdtrain.training.progress import StepResult
from sdtrain.training.stopping import Stopping

BATCH = 32
"""Images of a step."""

SIGINT = signal.SIGINT
SIGTERM = signal.SIGTERM
SIGKILL = signal.SIGKILL


@contextlib.contextmanager
def undone() -> Iterator[None]:
    """What the calls below change in this process is put back."""
    places = [(owner, name) for owner, name, _ in [*GUARDS.values(), *MOMENTS.values()]]
    kept = [(owner, name, getattr(owner, name)) for owner, name in places]
    try:
        yield
    finally:
        for owner, name, value in kept:
            setattr(owner, name, value)


# Guards that are broken: for the twins of what is proven.


def nothing(*given) -> None:
    """What a broken guard does."""


def unguarded_clip(self, optimizer, loss) -> StepResult:
    (group,) = optimizer.param_groups
    norm = nn.utils.clip_grad_norm_(group["params"], self.gradient_clip)
    return StepResult(torch.zeros(()), torch.zeros(()), norm)


GUARDS = {
    "asked": (MetricsLog, "on_save_checkpoint", nothing),
    "masked": (Optimisation, "clip", unguarded_clip),
    "looked at": (checkpoint_io, "find_non_finite", nothing),
    "heard": (Signals, "install", nothing),
    "agreed": (Stopping, "_agree", lambda self: (self.signals.received, False)),
}


def broken(*guards: str) -> None:
    for guard in guards:
        setattr(*GUARDS[guard])


def checkpoints_in_place() -> None:
    """They are written where they belong at once, and not beside it."""
    beside = files._temporary_path
    replace = files._replace_folder

    def in_place(path: Path) -> Path:
        return path if path.parent.name == "checkpoints" else beside(path)

    def replaced(new: Path, folder: Path) -> None:
        if new != folder:
            replace(new, folder)

    files._temporary_path = in_place
    files._replace_folder = replaced


# Numbers that are not finite


def weight(module, batch) -> None:
    """One weight is NaN."""
    with torch.no_grad():
        next(module.model.unet.parameters()).view(-1)[0] = math.nan


def latent(module, batch) -> None:
    """One number in the latents of the fourth sample is NaN, this once."""
    autoencoder = module.model.autoencoder
    encode = autoencoder.encode

    def once(image, posterior):
        latents = encode(image, posterior).clone()
        latents[3, 0, 0, 0] = math.nan
        autoencoder.encode = encode
        return latents

    autoencoder.encode = once


def in_step_5(happens) -> None:
    """Something happens to the module or the batch at the start of the fifth step."""
    step = DiffusionModule.training_step

    def sick(self, batch, batch_index):
        if batch.stream_end == 5 * BATCH:
            happens(self, batch)
        return step(self, batch, batch_index)

    DiffusionModule.training_step = sick


# Signals

MOMENTS = {
    "training": (DiffusionModule, "training_step", 3),
    "validation": (DiffusionModule, "validate", 2),  # the first measures what it costs
    "sampling": (sample_grid, "generate", 1),
    "saving": (checkpoint_io, "write_checkpoint", 2),
}


def signal_in(moment: str, number: int, sent: str) -> None:
    """The signal comes inside the call of that number, and the file `sent` with it."""
    owner, name, call = MOMENTS[moment]
    method = getattr(owner, name)
    calls = itertools.count(1)

    def signalled(*given, **named):
        if next(calls) == call:
            Path(sent).touch()
            os.kill(os.getpid(), number)
        return method(*given, **named)

    setattr(owner, name, signalled)


def signal_in_step_4(number: int, *, rank: int = 0, twice: bool = False) -> None:
    """The third step's checkpoint is there. Twice: once more in the save that follows."""
    step = DiffusionModule.training_step
    save_file = checkpoint_folder.save_file
    sent = []

    def signalled_step(self, batch, batch_index):
        if batch_index == 3 and self.global_rank == rank:
            self.trainer.strategy.checkpoint_io.settle()
            sent.append(number)
            os.kill(os.getpid(), number)
        return step(self, batch, batch_index)

    def signalled_save(*given):
        save_file(*given)
        if sent and twice:
            os.kill(os.getpid(), number)
            threading.Event().wait()  # until the main thread has ended the process

    DiffusionModule.training_step = signalled_step
    checkpoint_folder.save_file = signalled_save


# Full disks


def full_from_step_3(disk: str, until: int = 99) -> None:
    """No byte is free on the disk from the third step to the one before `until`."""
    step = DiffusionModule.training_step
    ballast = Path(disk, "ballast")

    def filled(self, batch, batch_index):
        self.trainer.strategy.checkpoint_io.settle()
        if batch.stream_end == 3 * BATCH:
            fill(ballast)
        if batch.stream_end == until * BATCH:
            ballast.unlink()
        return step(self, batch, batch_index)

    DiffusionModule.training_step = filled


def fill(path: Path) -> None:
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert "No space left" in str(error)


def rash_when_full(disk: str) -> None:
    """The older checkpoints go before the newer is written, and somebody else takes the room."""
    write = checkpoint_io.write_checkpoint

    def rash(folder, *given):
        if Path(disk, "ballast").exists():
            for old in list_checkpoints(folder.parent.parent):
                shutil.rmtree(old)
            fill(Path(disk, "more"))
        write(folder, *given)

    checkpoint_io.write_checkpoint = rash


def picture_that_hangs(ordinal: int, number: int = 0) -> None:
    """From that ordinal on no picture can be read to its end. `number` is a signal that the run is
    sent then.
    """
    read = RowsWithOrdinals.__getitem__
    run = os.getpid()

    def never(self, item):
        if item[1] >= ordinal:
            if number:
                os.kill(run, number)
            threading.Event().wait()
        return read(self, item)

    RowsWithOrdinals.__getitem__ = never
