"""Logs to Weights & Biases (wandb); a run never depends on it and never waits long for it."""

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
from sdtrain.paths import expand_home
from sdtrain.runs.layout import CheckpointFolder, RunFolder
from sdtrain.training.loggers.wandb_variables import FOLDER, NAME, RESUME, RUN_ID

REACH_LIMIT = 2.0
"""Seconds to wait for a connection to wandb's host."""
CALL_LIMIT = 7.0
"""Seconds that wandb's start, and each call, may take. Together with REACH_LIMIT less than 10 s,
the longest that a run should wait for what it does not depend on."""
UPLOAD_LIMIT = 300.0
"""Seconds that the last upload may take if the host can be reached; by then the run's own files are
complete."""
SLOWEST_UPLOAD = 1e6
"""Bytes per second: a checkpoint extends the limit of the last upload by its size divided by this.
"""


def failure_reason(call: Callable[[], object], limit: float) -> str | None:
    """Run `call` in a thread. Return why it failed, or None if it succeeded.

    A call that takes longer than `limit` seconds counts as failed, and is abandoned.
    """
    errors: list[str] = []

    def attempt() -> None:
        try:
            call()
        except Exception as error:  # any error: the run must not depend on the call
            errors.append(f"{type(error).__name__}: {error}".splitlines()[0])

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(limit)
    if thread.is_alive():
        return f"no answer in {limit:.0f} s"
    return errors[0] if errors else None


class GuardedWandb(WandbLogger):
    """Lightning's WandbLogger, switched off once a call raises or takes longer than its limit.

    Calls pass their data to wandb's own process, which uploads it in the background: a host that is
    slow or unreachable does not delay a call.
    """

    is_off = False
    uploads_checkpoint = False
    """Whether the last checkpoint is uploaded when the run has finished."""
    upload_limit = UPLOAD_LIMIT

    def run_guarded(self, call: Callable[[], object], limit: float = CALL_LIMIT) -> None:
        """Run `call`, and switch the logger off if it fails."""
        if self.is_off:
            return
        reason = failure_reason(call, limit)
        if reason:
            self.is_off = True
            _switch_off(reason)

    def run_guarded_with_answer(self, call: Callable[[], object]) -> None:
        """Like `run_guarded`, but also requires an answer from wandb's process.

        Otherwise a run would write to a process that hangs until the socket's buffer is full.
        """

        def call_and_ask() -> None:
            call()
            self.experiment.status()

        self.run_guarded(call_and_ask)

    @rank_zero_only
    def log_hyperparams(self, params: dict) -> None:
        self.run_guarded_with_answer(lambda: super(GuardedWandb, self).log_hyperparams(params))

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.run_guarded_with_answer(lambda: super(GuardedWandb, self).log_metrics(metrics, step))

    def log_guarded(self, make: Callable[[], dict], images_seen: int) -> None:
        """Log what `make` returns; it is called within the guard."""
        self.run_guarded_with_answer(
            lambda: self.experiment.log(make() | {"images_seen": images_seen})
        )

    def log_checkpoint(self, checkpoint: CheckpointFolder) -> None:
        """Log a checkpoint as an artifact. wandb copies its files, as an upload may happen later,
        when a resumed run has removed the checkpoint.
        """
        files = sorted(path for path in checkpoint.path.rglob("*") if path.is_file())
        self.upload_limit += sum(file.stat().st_size for file in files) / SLOWEST_UPLOAD

        def log_artifact() -> None:
            import wandb

            artifact = wandb.Artifact(
                f"checkpoint-{self.experiment.id}",
                type="model",
                metadata={"images_seen": checkpoint.images_seen},
            )
            for file in files:
                artifact.add_file(str(file), file.relative_to(checkpoint.path).as_posix())
            self.experiment.log_artifact(artifact)

        self.run_guarded(log_artifact, self.upload_limit)

    def finish(self, failed: bool) -> None:
        """Finish the wandb run.

        The remaining data are uploaded for up to `upload_limit` seconds if the run succeeded and
        both wandb's process and its host answer.
        """
        self.run_guarded(self.experiment.status)
        uploads = not failed and not self.is_off and not self.experiment.offline and reachable()
        if uploads:
            print(
                f"wandb uploads the remaining data, for at most {self.upload_limit:.0f} s.",
                flush=True,
            )
        limit = self.upload_limit if uploads else CALL_LIMIT
        self.run_guarded(lambda: self.experiment.finish(int(failed)), limit)


def _switch_off(reason: str) -> None:
    """Warn, and kill wandb's process, for which the interpreter's exit would wait without limit.

    What that process has written can still be uploaded by `wandb sync`.
    """
    warn(
        f"wandb failed ({reason}) and is not used from now on; the run continues, and "
        "metrics.jsonl has every metric."
    )
    # Private parts of wandb 0.31; if they are missing, the exit may take longer.
    with contextlib.suppress(KeyError, AttributeError, OSError):
        # Not an import statement: an import, or its lock, may be what hangs.
        connection = sys.modules["wandb.sdk.wandb_setup"]._singleton._connection
        connection._proc._process.kill()
        connection._cleanup()


def wandb_host() -> tuple[str, int]:
    """Return (host, port) of the server in WANDB_BASE_URL, by default api.wandb.ai."""
    url = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    default_port = 80 if url.scheme == "http" else 443
    return url.hostname or "api.wandb.ai", url.port or default_port


def logged_in() -> bool:
    """Return whether there is a key for the server, in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(wandb_host()[0]) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def reachable() -> bool:
    """Return whether the server can be reached; wandb itself would wait 90 s and then raise."""
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
    """Log to Weights & Biases: online if the user is logged in and the host answers, else offline.

    resumed: images seen at the checkpoint that the run resumes from, 0 for a new run.
    """
    if mode == "disabled":
        return None
    if rank_zero_only.rank > 0:
        # Never starts a wandb run: rank 0's is the only one.
        return GuardedWandb(save_dir=run_dir, offline=True)
    # Read by wandb's import: error reports would delay the exit by 10 s if the host is silent.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    # Imported before the time is measured: a slow disk is no reason to switch wandb off.
    importlib.import_module("wandb")
    offline_reason = _offline_reason(mode)
    if mode in ("online", "shared") and offline_reason:
        print(f"sdtrain: logger.mode={mode}, but {offline_reason}: wandb is offline.", flush=True)
    online_mode = "shared" if mode == "shared" else "online"
    init_arguments = {
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
        started.append(_start_wandb(init_arguments, run_dir, resumed))

    # Offline the start depends on this machine alone, which may be busy.
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
    """Return why wandb is not online; None if it can be."""
    if mode == "offline":
        return "as requested"
    if not logged_in():
        return "not logged in"
    if not reachable():
        return f"{wandb_host()[0]} cannot be reached"
    return None


def _print_offline(wandb_run, reason: str) -> None:
    """Print how to view an offline run, and how to upload it."""
    folder = Path(wandb_run.dir).parent
    sessions = folder.with_name(f"offline-run-*-{wandb_run.id}")  # a resumed run has several
    print(
        f"wandb is offline ({reason}). View the run with `wandb leet {folder}`, "
        f"or upload it with `wandb sync {sessions}`.",
        flush=True,
    )


def own_data_dir(run_dir: Path | str) -> str:
    """Return the value of WANDB_DATA_DIR: a folder inside the run's."""
    return str(RunFolder(Path(run_dir).resolve()).wandb)


def wandb_run_id(run_dir: Path, resumed: int) -> str:
    """Return wandb's id of the run, which is stored in its folder: WANDB_RUN_ID if that is set.

    A resumed run keeps its id; a new run in the same folder gets another.
    """
    file = RunFolder(Path(run_dir).resolve()).wandb_id
    id_from_environment = os.environ.get(RUN_ID)
    if id_from_environment or not resumed or not file.is_file():
        file.parent.mkdir(exist_ok=True)
        write_text(file, id_from_environment or uuid.uuid4().hex[:12])
    return file.read_text()


def _start_wandb(init_arguments: dict[str, Any], run_dir: Path, resumed: int) -> object:
    """Start the wandb run. init_arguments: arguments of wandb.init that describe the run."""
    import wandb as library

    # Data that wait for an upload go into the run's folder, not into the user's home.
    os.environ.setdefault("WANDB_DATA_DIR", own_data_dir(run_dir))
    settings = library.Settings(
        silent=True,
        console="off",
        init_timeout=CALL_LIMIT,
        x_disable_meta=True,  # it would hold the command line, and secrets typed there
    )
    # Offline, id and resume are stored in the run's file, so that `wandb sync` uploads all sessions
    # as one run.
    run = library.init(
        dir=expand_home(os.environ.get(FOLDER) or str(run_dir)),
        settings=settings,
        id=wandb_run_id(run_dir, resumed),
        resume=os.environ.get(RESUME) or "allow",
        **init_arguments,
    )
    run.define_metric("images_seen")
    run.define_metric("*", step_metric="images_seen")
    return run
