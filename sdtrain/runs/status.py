"""status.json: what has become of a run."""

import contextlib
import json
from dataclasses import asdict, dataclass
from typing import Literal

from sdtrain.errors import StorageError
from sdtrain.files import write_text
from sdtrain.runs.layout import RunFolder

State = Literal["running", "finished", "interrupted", "diverged", "failed"]


@dataclass(frozen=True)
class Status:
    """state; the process that wrote it; images seen; its exit code, None while it runs; the command
    it was started by.
    """

    state: State
    pid: int
    images_seen: int
    exit_code: int | None
    peak_memory_mb: int
    command: str


def write_status(run: RunFolder, status: Status) -> None:
    """Raises StorageError where the disk refuses a beginning or an end. What else ends a run is
    reported, and not hidden by this.
    """
    try:
        write_text(run.status, json.dumps(asdict(status), indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        if status.state in ("running", "finished"):
            raise StorageError(
                f"{run.status} cannot be written: {error.strerror}",
                key="hydra.run.dir",
                remedy="Free space and resume with resume=auto.",
            ) from error


def read_status(run: RunFolder) -> dict:
    """What the file holds; nothing where it is missing or no file of ours."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return dict(json.loads(run.status.read_text(encoding="utf-8")))
    return {}


def is_finished(run: RunFolder) -> bool:
    """Whether the run has come to its end, and can be read."""
    return read_status(run).get("state") == "finished" and run.config.is_file()
