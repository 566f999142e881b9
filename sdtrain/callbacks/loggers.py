"""The loggers one can choose, and what they can be asked beyond numbers."""

import contextlib
import netrc
import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal
from urllib.parse import urlparse

import numpy as np
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from sdtrain.errors import UserError

LIMIT = 8.0  # seconds that one call of wandb may take: the run does not wait longer for what it does not depend on
FINISH = 300.0  # and its last one, which uploads what is left; the run's own files are complete by then


class GuardedWandb(WandbLogger):
    """Lightning's logger of wandb, which is switched off with one warning once a call raises or takes longer than its limit."""

    off = False

    def guarded(self, call: Callable[[], object], limit: float | None = None) -> None:
        if self.off:
            return
        failed: list[str] = []

        def attempt() -> None:
            try:
                call()
            except Exception as error:  # whatever wandb raises, the run does not depend on it
                failed.append(f"{type(error).__name__}: {error}")

        thread = threading.Thread(target=attempt, daemon=True)
        thread.start()
        thread.join(LIMIT if limit is None else limit)
        if failed or thread.is_alive():
            self.off = True
            _abandon_service()
            reason = failed[0].splitlines()[0] if failed else "it does not answer"
            print(f"sdtrain: wandb fails ({reason}) and is left out from now on; the run goes on, metrics.jsonl has all numbers.", file=sys.stderr, flush=True)

    @rank_zero_only
    def log_hyperparams(self, params: dict) -> None:
        self.guarded(lambda: super(GuardedWandb, self).log_hyperparams(params))

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.guarded(lambda: super(GuardedWandb, self).log_metrics(metrics, step))


def _abandon_service() -> None:
    """Ends wandb's process, for which the interpreter would wait at its exit without a limit. What it has written stays for `wandb sync`."""
    import wandb as library

    with contextlib.suppress(AttributeError, OSError):  # private parts of wandb 0.31; without them the exit may take longer
        connection = library.setup()._connection
        connection._proc._process.kill()
        connection._cleanup()


def wandb_host() -> tuple[str, int]:
    url = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    return url.hostname or "api.wandb.ai", url.port or (80 if url.scheme == "http" else 443)


def logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(wandb_host()[0]) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def reachable(timeout: float = 5.0) -> bool:
    """Whether wandb's host answers. wandb itself would wait a minute and a half, and then raise."""
    try:
        socket.create_connection(wandb_host(), timeout).close()
        return True
    except OSError:
        return False


def wandb(*, project: str, mode: Literal["auto", "online", "offline"], run_dir: Path, name: str) -> Logger | None:
    """Weights & Biases: online where the user is logged in and the host answers, otherwise offline with one line that says so."""
    mode = os.environ.get("WANDB_MODE", mode)
    if mode == "disabled":
        return None
    why = "asked for" if mode == "offline" else "not logged in" if not logged_in() else None if reachable() else f"{wandb_host()[0]} cannot be reached"
    if mode == "online" and why is not None:
        print(f"sdtrain: logger.mode=online, but {why}: going on offline.", flush=True)
    try:
        logger = _start_wandb(project, why is not None, run_dir, name)
    except Exception as error:  # whatever wandb raises, the run and its metrics.jsonl do not depend on it
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        print(f"sdtrain: wandb does not start ({reason}); the run goes on, metrics.jsonl has every number.", flush=True)
        return None
    if why is not None:
        _say_offline(logger, why)
    return logger


def own_data_dir(run_dir: Path | str) -> str:
    return str(Path(run_dir).resolve() / "wandb")


def _start_wandb(project: str, offline: bool, run_dir: Path, name: str) -> GuardedWandb:
    if rank_zero_only.rank > 0:
        return GuardedWandb(save_dir=run_dir, offline=True)  # never asked for its run: rank 0's is the only one
    import wandb as library

    # What waits for an upload lies in the run, not in the user's home: an offline run is one folder.
    os.environ.setdefault("WANDB_DATA_DIR", own_data_dir(run_dir))
    # Its metadata would hold the command line, and with it what was typed there in secret.
    settings = library.Settings(silent=True, console="off", init_timeout=LIMIT, x_disable_stats=True, x_disable_meta=True)
    run = library.init(project=project, name=name, dir=run_dir, mode="offline" if offline else "online", settings=settings)
    run.define_metric("images_seen")
    run.define_metric("*", step_metric="images_seen")
    return GuardedWandb(experiment=run, save_dir=run_dir)


@rank_zero_only
def _say_offline(logger: GuardedWandb, why: str) -> None:
    folder = Path(logger.experiment.dir).parent
    print(f"wandb is offline ({why}). Look at the run with `wandb leet {folder}`, or upload it with `wandb sync {folder}`.", flush=True)


@rank_zero_only
def close(logger: Logger) -> None:
    """Ends the logger's run: the next one of a sweep starts its own."""
    logger.finalize("success")
    if isinstance(logger, GuardedWandb):
        logger.guarded(logger.experiment.finish, FINISH)
        if os.environ.get("WANDB_DATA_DIR") == own_data_dir(logger.save_dir):
            del os.environ["WANDB_DATA_DIR"]


def csv(*, run_dir: Path) -> Logger:
    """Lightning's metrics.csv under csv/ in the run."""
    return CSVLogger(run_dir, name="csv", version="")


def tensorboard(*, run_dir: Path) -> Logger:
    """Event files under tensorboard/ in the run: `tensorboard --logdir RUN`."""
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        raise UserError("logger=tensorboard needs the package tensorboard: pip install tensorboard, or choose another logger.") from None
    return TensorBoardLogger(run_dir, name="tensorboard", version="")


def log_picture(logger: Logger, key: str, picture: Image.Image, images_seen: int) -> None:
    """A picture to a logger that takes pictures."""
    if isinstance(logger, GuardedWandb):
        import wandb as library

        logger.guarded(lambda: logger.experiment.log({key: library.Image(picture), "images_seen": images_seen}))
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(key, torch.from_numpy(np.array(picture)), images_seen, dataformats="HWC")


def log_table(logger: Logger, key: str, columns: list[str], rows: list[list], images_seen: int) -> None:
    """A table to wandb; cells that are pictures ([H, W, 3] uint8 arrays) are shown as such.

    Offline, wandb keeps the table's pictures for the upload alone; so each is logged by itself too, where `wandb leet` and people find it.
    """
    if isinstance(logger, GuardedWandb):
        import wandb as library

        def log() -> None:
            data = [[library.Image(cell) if isinstance(cell, np.ndarray) else cell for cell in row] for row in rows]
            single = [library.Image(row[-1], caption=", ".join(map(str, row[1:-1]))) for row in rows]
            logger.experiment.log({key: library.Table(columns=columns, data=data), f"{key}_pictures": single, "images_seen": images_seen})

        logger.guarded(log)
