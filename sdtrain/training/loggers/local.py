"""Loggers that write into the run's folder."""

from importlib.util import find_spec
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from sdtrain.errors import UserError


def csv(*, run_dir: Path) -> Logger:
    """Lightning's metrics.csv under csv/ in the run."""
    return CSVLogger(run_dir, name="csv", version="")


def tensorboard(*, run_dir: Path, resumed: int) -> Logger:
    """Event files under tensorboard/ in the run: `tensorboard --logdir RUN`.

    What an earlier process logged beyond `resumed` images is purged.
    """
    if find_spec("tensorboard") is None:
        raise UserError(
            "needs the package tensorboard",
            key="logger",
            value="tensorboard",
            remedy="pip install tensorboard, or choose another logger.",
        )
    purge_step = resumed + 1 if resumed else None
    return TensorBoardLogger(run_dir, name="tensorboard", version="", purge_step=purge_step)
