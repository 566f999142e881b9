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
from typing import Any, Literal
from urllib.parse import urlparse

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from sdtrain.console import warn
from sdtrain.files import write_text
from sdtrain.paths import expanded
from sdtrain.runs.layout import CheckpointFolder, RunFolder
from sdtrain.training.loggers.wandb_variables import FOLDER, NAME, RESUME, RUN_ID

REACH_LIMIT = 2.0
"""Seconds in which wandb's host has to be found."""
CALL_LIMIT = 7.0
"""Seconds that wandb's start, and each of its calls, may take: with REACH_LIMIT less than the 10 s
that a run waits for what it does not depend on."""
UPLOAD_LIMIT = 300.0
"""Seconds that the last upload may take, while the host is there; the run's own files are complete
by then."""
SLOWEST_UPLOAD = 1e6
"""Bytes in a second: a checkpoint lengthens the last upload by its size over this."""


def failure_reason(call: Callable[[], object], limit: float) -> str | None:
    """Runs `call` in a thread. Returns why it failed, None where it succeeded.

    A call that takes longer than `limit` seconds has failed too, and is abandoned.
    """
    errors: list[str] = []

    def attempt() -> None:
        try:
            call()
        except Exception as error:  # whatever it raises, the run does not depend on it
            errors.append(f"{type(error).__name__}: {error}".splitlines()[0])

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(limit)
    if thread.is_alive():
        return f"no answer in {limit:.0f} s"
    return errors[0] if errors else None


class GuardedWandb(WandbLogger):
    """Lightning's logger of wandb, switched off once a call raises or takes longer than its limit.

    What is logged goes to wandb's process, which uploads it in its own time: a host that is slow or
    gone holds up no call.
    """

    is_off = False
    uploads_checkpoint = False
    """Whether the last checkpoint is uploaded when the run has finished."""
    upload_limit = UPLOAD_LIMIT

    def guarded(self, call: Callable[[], object], limit: float = CALL_LIMIT) -> None:
        """Runs `call`; switches the logger off where it fails."""
        if self.is_off:
            return
        reason = failure_reason(call, limit)
        if reason:
            self.is_off = True
            _switch_off(reason)

    def answered(self, call: Callable[[], object]) -> None:
        """Guarded, and wandb's process has to answer.

        Otherwise a run would write to one that stands still until the socket is full.
        """
        self.guarded(lambda: (call(), self.experiment.status()))

    @rank_zero_only
    def log_hyperparams(self, params: dict) -> None:
        self.answered(lambda: super(GuardedWandb, self).log_hyperparams(params))

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.answered(lambda: super(GuardedWandb, self).log_metrics(metrics, step))

    def log_guarded(self, make: Callable[[], dict], images_seen: int) -> None:
        """Logs what `make` returns; it is called within the guard."""
        self.answered(lambda: self.experiment.log(make() | {"images_seen": images_seen}))

    def log_checkpoint(self, checkpoint: CheckpointFolder) -> None:
        """Hands a checkpoint over, as an artifact. wandb copies it: it may be synced later, when
        the run has gone on and removed it.
        """
        files = sorted(path for path in checkpoint.path.rglob("*") if path.is_file())
        self.upload_limit += sum(file.stat().st_size for file in files) / SLOWEST_UPLOAD

        def hand_over() -> None:
            import wandb

            artifact = wandb.Artifact(
                f"checkpoint-{self.experiment.id}",
                type="model",
                metadata={"images_seen": checkpoint.images_seen},
            )
            for file in files:
                artifact.add_file(str(file), file.relative_to(checkpoint.path).as_posix())
            self.experiment.log_artifact(artifact)

        self.guarded(hand_over, self.upload_limit)

    def finish(self, failed: bool) -> None:
        """Ends wandb's run.

        What is left is uploaded for up to `upload_limit` seconds when all went well and both
        wandb's process and its host answer.
        """
        self.guarded(self.experiment.status)
        uploads = not failed and not self.is_off and not self.experiment.offline and reachable()
        if uploads:
            longest = f"{self.upload_limit:.0f} s"
            print(f"wandb uploads what is left, for at most {longest}.", flush=True)
        limit = self.upload_limit if uploads else CALL_LIMIT
        self.guarded(lambda: self.experiment.finish(int(failed)), limit)


def _switch_off(reason: str) -> None:
    """Warns, and kills wandb's process: the interpreter's exit would wait for it without a limit.

    What that process has written stays for `wandb sync`.
    """
    warn(
        f"wandb fails ({reason}) and is left out from now on; the run goes on, "
        "metrics.jsonl has every number."
    )
    # Private parts of wandb 0.31; without them the exit may take longer.
    with contextlib.suppress(KeyError, AttributeError, OSError):
        # No import: that, or a lock, may be what does not answer.
        connection = sys.modules["wandb.sdk.wandb_setup"]._singleton._connection
        connection._proc._process.kill()
        connection._cleanup()


def wandb_host() -> tuple[str, int]:
    """(host, port) of the server that the environment names, or of wandb.ai."""
    url = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    default_port = 80 if url.scheme == "http" else 443
    return url.hostname or "api.wandb.ai", url.port or default_port


def logged_in() -> bool:
    """Whether there is a key for the server, in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(wandb_host()[0]) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def reachable() -> bool:
    """Whether the server answers. wandb itself would wait a minute and a half, and then raise."""
    connect = socket.create_connection
    return failure_reason(lambda: connect(wandb_host()).close(), REACH_LIMIT) is None


def wandb(
    *,
    project: str,
    mode: Literal["auto", "online", "offline", "shared", "disabled"],
    entity: str | None = None,
    group: str | None = None,
    tags: list[str] | None = None,
    notes: str | None = None,
    job_type: str | None = None,
    log_checkpoint: Literal["none", "last"] = "none",
    run_dir: Path,
    name: str,
    resumed: int,
) -> Logger | None:
    """Weights & Biases: online where the user is logged in and the host answers, else offline.

    resumed: images seen at the checkpoint that the run goes on from, 0 where it starts anew.
    """
    if mode == "disabled":
        return None
    if rank_zero_only.rank > 0:
        # It is never asked for its wandb run: rank 0's is the only one.
        return GuardedWandb(save_dir=run_dir, offline=True)
    # Read by wandb's import: error reports hold up the exit for 10 s where the host is silent.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    # Imported before the clock runs: a slow disk is no reason to leave wandb out.
    importlib.import_module("wandb")
    offline_reason = _offline_reason(mode)
    if mode in ("online", "shared") and offline_reason:
        print(f"sdtrain: logger.mode={mode}, but {offline_reason}: going on offline.", flush=True)
    online_mode = "shared" if mode == "shared" else "online"
    described = {
        "project": project,
        "entity": entity,
        "group": group,
        "tags": tags,
        "notes": notes,
        "job_type": job_type,
        "name": os.environ.get(NAME) or name,
        "mode": "offline" if offline_reason else online_mode,
    }
    started: list = []

    def start() -> None:
        started.append(_start_wandb(described, run_dir, resumed))

    # Offline, wandb waits for this machine alone, which may be busy.
    reason = failure_reason(start, 3 * CALL_LIMIT if offline_reason else CALL_LIMIT)
    if reason:
        _switch_off(reason)
        return None
    if offline_reason:
        _print_offline(started[0], offline_reason)
    logger = GuardedWandb(experiment=started[0], save_dir=run_dir)
    logger.uploads_checkpoint = log_checkpoint == "last"
    return logger


def _offline_reason(mode: str) -> str | None:
    """Why wandb cannot be online, or is not to be."""
    if mode == "offline":
        return "asked for"
    if not logged_in():
        return "not logged in"
    if not reachable():
        return f"{wandb_host()[0]} cannot be reached"
    return None


def _print_offline(wandb_run, reason: str) -> None:
    """Prints how to look at a run that is offline, and how to upload it."""
    folder = Path(wandb_run.dir).parent
    sessions = folder.with_name(f"offline-run-*-{wandb_run.id}")  # a resumed run has several
    print(
        f"wandb is offline ({reason}). Look at the run with `wandb leet {folder}`, "
        f"or upload it with `wandb sync {sessions}`.",
        flush=True,
    )


def own_data_dir(run_dir: Path | str) -> str:
    """WANDB_DATA_DIR inside the run's folder."""
    return str(RunFolder(Path(run_dir).resolve()).wandb)


def wandb_run_id(run_dir: Path, resumed: int) -> str:
    """wandb's id of the run, kept in its folder: WANDB_RUN_ID where that is set.

    A resumed run has the same one; one that starts anew in that folder has another.
    """
    file = RunFolder(Path(run_dir).resolve()).wandb_id
    given = os.environ.get(RUN_ID)
    if given or not resumed or not file.is_file():
        file.parent.mkdir(exist_ok=True)
        write_text(file, given or uuid.uuid4().hex[:12])
    return file.read_text()


def _start_wandb(described: dict[str, Any], run_dir: Path, resumed: int) -> object:
    """described: what wandb is told of the run, as arguments of its init."""
    import wandb as library

    # What waits for an upload lies in the run, not in the user's home.
    os.environ.setdefault("WANDB_DATA_DIR", own_data_dir(run_dir))
    settings = library.Settings(
        silent=True,
        console="off",
        init_timeout=CALL_LIMIT,
        x_disable_meta=True,  # it would hold the command line, and secrets that were typed there
    )
    # Offline, id and resume are kept in the run's file: `wandb sync` makes one run of its sessions.
    run = library.init(
        dir=expanded(os.environ.get(FOLDER) or str(run_dir)),
        settings=settings,
        id=wandb_run_id(run_dir, resumed),
        resume=os.environ.get(RESUME) or "allow",
        **described,
    )
    run.define_metric("images_seen")
    run.define_metric("*", step_metric="images_seen")
    return run
