"""status.json: the state of a run."""

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
    """The contents of status.json.

    Args:
        state: of the run.
        pid: of the process that wrote the file.
        images_seen: by the run so far.
        exit_code: of the process, None while it runs.
        peak_memory_mb: largest memory of that process in MiB: on its GPU, or in RAM without one.
        command: that started the run.
    """

    state: State
    pid: int
    images_seen: int
    exit_code: int | None
    peak_memory_mb: int
    command: str


def write_status(run: RunFolder, status: Status) -> None:
    """Write status.json. Raises StorageError if that fails at the start or the end of a run.

    In other states it fails silently, so that it does not hide the error that ended the run.
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
    """Return the contents of the file; empty if it is missing or not written by sdtrain."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return dict(json.loads(run.status.read_text(encoding="utf-8")))
    return {}


def is_finished(run: RunFolder) -> bool:
    """Whether the run has finished and its configuration is there."""
    return read_status(run).get("state") == "finished" and run.config.is_file()
