"""Loggers that write to the run's folder."""

from importlib.util import find_spec
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from sdtrain.errors import UserError
from sdtrain.runs.layout import RunFolder


def csv(*, run_dir: Path) -> Logger:
    """Write Lightning's metrics.csv under csv/ in the run's folder."""
    return CSVLogger(run_dir, name=RunFolder(run_dir).csv.name, version="")


def tensorboard(*, run_dir: Path, resumed: int) -> Logger:
    """Write event files under tensorboard/ in the run's folder: `tensorboard --logdir RUN`.

    Purges what an earlier process has logged beyond `resumed` images.
    """
    check_tensorboard()
    purge_step = resumed + 1 if resumed else None
    name = RunFolder(run_dir).tensorboard.name
    return TensorBoardLogger(run_dir, name=name, version="", purge_step=purge_step)


def check_tensorboard() -> None:
    """Raise UserError if the package is missing."""
    if find_spec("tensorboard") is None:
        raise UserError(
            "needs the package tensorboard, which sdtrain's extra of that name installs",
            key="logger",
            value="tensorboard",
            remedy="Run pip install 'sdtrain[tensorboard]', or choose another logger.",
        )
