"""Weights & Biases, which a run never waits long for and never depends on."""

import contextlib
import importlib
import netrc
import os
import socket
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Literal
from urllib.parse import urlparse

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from sdtrain.files import write_text

REACH = 2.0  # seconds in which wandb's host has to be found
LIMIT = 7.0  # and that its start, and each of its calls, may take: together less than the 10 s that a run waits for what it does not depend on
FINISH = (
    300.0  # and its last upload, while the host is there; the run's own files are complete by then
)


def failure(call: Callable[[], object], limit: float) -> str | None:
    """Calls in a thread, and says why that failed. A call that takes longer than `limit` seconds has failed too, and is left behind."""
    said: list[str] = []

    def attempt() -> None:
        try:
            call()
        except Exception as error:  # whatever it raises, the run does not depend on it
            said.append(f"{type(error).__name__}: {error}".splitlines()[0])

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(limit)
    return f"no answer in {limit:.0f} s" if thread.is_alive() else said[0] if said else None


class GuardedWandb(WandbLogger):
    """Lightning's logger of wandb, which is switched off with one warning once a call raises or takes longer than its limit.

    What is logged goes to wandb's process, which uploads it in its own time: a host that is slow or gone holds up no call.
    """

    off = False

    def guarded(self, call: Callable[[], object], limit: float = LIMIT) -> None:
        if not self.off and (reason := failure(call, limit)):
            self.off = True
            _leave_out(reason)

    def answered(self, call: Callable[[], object]) -> None:
        """Guarded, and wandb's process has to answer: without that a run would write to one that stands still until the socket is full."""
        self.guarded(lambda: (call(), self.experiment.status()))

    @rank_zero_only
    def log_hyperparams(self, params: dict) -> None:
        self.answered(lambda: super(GuardedWandb, self).log_hyperparams(params))

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.answered(lambda: super(GuardedWandb, self).log_metrics(metrics, step))

    def log_guarded(self, make: Callable[[], dict], images_seen: int) -> None:
        """Logs what `make` gives, made within the guard."""
        self.answered(lambda: self.experiment.log(make() | {"images_seen": images_seen}))

    def finish(self, failed: bool) -> None:
        """Ends wandb's run. What is left is uploaded for up to FINISH seconds when all went well and both wandb's process and its host answer."""
        self.guarded(self.experiment.status)
        uploads = not failed and not self.off and not self.experiment.offline and reachable()
        if uploads:
            print(f"wandb uploads what is left, for at most {FINISH:.0f} s.", flush=True)
        self.guarded(lambda: self.experiment.finish(int(failed)), FINISH if uploads else LIMIT)


def _leave_out(reason: str) -> None:
    """Says so, and ends wandb's process, for which the interpreter would wait at its exit without a limit. What it has written stays for `wandb sync`."""
    print(
        f"sdtrain: wandb fails ({reason}) and is left out from now on; the run goes on, metrics.jsonl has every number.",
        file=sys.stderr,
        flush=True,
    )
    with contextlib.suppress(
        KeyError, AttributeError, OSError
    ):  # private parts of wandb 0.31; without them the exit may take longer
        connection = sys.modules[
            "wandb.sdk.wandb_setup"
        ]._singleton._connection  # an import or a lock may be what does not answer
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


def reachable() -> bool:
    """Whether wandb's host answers. wandb itself would wait a minute and a half, and then raise."""
    return failure(lambda: socket.create_connection(wandb_host()).close(), REACH) is None


def wandb(
    *,
    project: str,
    mode: Literal["auto", "online", "offline"],
    run_dir: Path,
    name: str,
    resumed: int,
) -> Logger | None:
    """Weights & Biases: online where the user is logged in and the host answers, otherwise offline with one line that says so.

    resumed: images seen at the checkpoint that the run goes on from, 0 where it starts anew.
    """
    mode = os.environ.get("WANDB_MODE", mode)
    if mode == "disabled":
        return None
    if rank_zero_only.rank > 0:
        return GuardedWandb(
            save_dir=run_dir, offline=True
        )  # never asked for its run: rank 0's is the only one
    os.environ.setdefault(
        "WANDB_ERROR_REPORTING", "false"
    )  # read by its import: these reports would hold up the exit for 10 s where the host is silent
    importlib.import_module(
        "wandb"
    )  # before the clock runs: a slow disk is no reason to leave it out
    why = (
        "asked for"
        if mode == "offline"
        else "not logged in"
        if not logged_in()
        else None
        if reachable()
        else f"{wandb_host()[0]} cannot be reached"
    )
    if mode == "online" and why is not None:
        print(f"sdtrain: logger.mode=online, but {why}: going on offline.", flush=True)
    runs: list = []
    limit = (
        LIMIT if why is None else 3 * LIMIT
    )  # offline it waits for this machine alone, which may be busy
    if reason := failure(
        lambda: runs.append(_start_wandb(project, why is not None, run_dir, name, resumed)), limit
    ):
        _leave_out(reason)
        return None
    if why is not None:
        folder = Path(runs[0].dir).parent
        sessions = folder.with_name(f"offline-run-*-{runs[0].id}")  # a resumed run has several
        print(
            f"wandb is offline ({why}). Look at the run with `wandb leet {folder}`, or upload it with `wandb sync {sessions}`.",
            flush=True,
        )
    return GuardedWandb(experiment=runs[0], save_dir=run_dir)


def own_data_dir(run_dir: Path | str) -> str:
    return str(Path(run_dir).resolve() / "wandb")


def _run_id(run_dir: Path, resumed: int) -> str:
    """wandb's id of the run. It stays in the run's folder, and a resumed run goes on under it; one that starts anew there has another."""
    file = Path(own_data_dir(run_dir), "id")
    if not resumed or not file.is_file():
        file.parent.mkdir(exist_ok=True)
        write_text(file, uuid.uuid4().hex[:12])
    return file.read_text()


def _start_wandb(project: str, offline: bool, run_dir: Path, name: str, resumed: int) -> object:
    import wandb as library

    # What waits for an upload lies in the run, not in the user's home: an offline run is one folder.
    os.environ.setdefault("WANDB_DATA_DIR", own_data_dir(run_dir))
    # Its metadata would hold the command line, and with it what was typed there in secret.
    settings = library.Settings(
        silent=True, console="off", init_timeout=LIMIT, x_disable_stats=True, x_disable_meta=True
    )
    # Offline, id and resume are kept in the run's file: `wandb sync` makes one run of its sessions.
    given = {
        "id": os.environ.get("WANDB_RUN_ID") or _run_id(run_dir, resumed),
        "resume": "allow",
        "mode": "offline" if offline else "online",
    }
    run = library.init(project=project, name=name, dir=run_dir, settings=settings, **given)
    run.define_metric("images_seen")
    run.define_metric("*", step_metric="images_seen")
    return run
