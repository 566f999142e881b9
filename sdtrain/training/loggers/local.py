"""Loggers that write into the run's folder."""

from importlib.util import find_spec
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from sdtrain.errors import UserError
from sdtrain.runs.layout import RunFolder


def csv(*, run_dir: Path) -> Logger:
    """Lightning's metrics.csv under csv/ in the run."""
    return CSVLogger(run_dir, name=RunFolder(run_dir).csv.name, version="")


def tensorboard(*, run_dir: Path, resumed: int) -> Logger:
    """Event files under tensorboard/ in the run: `tensorboard --logdir RUN`.

    What an earlier process logged beyond `resumed` images is purged.
    """
    if find_spec("tensorboard") is None:
        raise UserError(
            "needs the package tensorboard",
            key="logger",
            value="tensorboard",
            remedy="Run pip install tensorboard, or choose another logger.",
        )
    purge_step = resumed + 1 if resumed else None
    name = RunFolder(run_dir).tensorboard.name
    return TensorBoardLogger(run_dir, name=name, version="", purge_step=purge_step)
