"""metrics.jsonl: lines are added whole or not at all, and a resumed run drops the later ones.

Without torch.
"""

import contextlib
import json
import math
import os
from pathlib import Path

from sdtrain.errors import StorageError
from sdtrain.files import write_text
from sdtrain.runs.layout import RunFolder, images_seen_of


def metrics_line(
    images_seen: int, seconds: float, numbers: dict[str, float], lists: dict[str, list]
) -> str:
    """One line of metrics.jsonl. A number that is not finite becomes null: JSON has no NaN."""
    finite = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
    record = {"images_seen": images_seen, "seconds": round(seconds, 3), **finite, **lists}
    return json.dumps(record) + "\n"


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl that can be read, images_seen as int and seconds as float; none
    where there is no file.
    """
    found = []
    with contextlib.suppress(OSError):
        for _, record in _records(path):
            with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError):
                record["seconds"] = float(record["seconds"])
                found.append(record)
    return found


def _records(path: Path) -> list[tuple[str, dict]]:
    """(line, what it says) of each line that is whole and one of ours. Raises OSError."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError):
            record = json.loads(line)
            record["images_seen"] = int(record["images_seen"])
            found.append((line, record))
    return found


class MetricsFile:
    """The metrics.jsonl of one run. Lines that the disk refuses wait until it has room.

    waiting: the lines that are not in the file yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: list[str] = []

    def append(self, line: str) -> str | None:
        """Adds a line after those that wait. Returns as `write_waiting` does."""
        self.waiting.append(line)
        return self.write_waiting()

    def write_waiting(self) -> str | None:
        """Adds the lines that wait, all or none. Returns why the disk refuses them, or None."""
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(self.waiting))
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)  # half a line would be continued by the next one
            return f"{self.path} cannot be written: {error.strerror}"
        self.waiting.clear()
        return None

    def keep_until(self, images_seen: int) -> list[dict]:
        """Removes half a line, and the lines of more images. Returns the others.

        The run that goes on writes the later ones again. Raises StorageError where the file cannot
        be written.
        """
        if not self.path.exists():
            return []
        kept = []
        records = []
        for line, record in _records(self.path):
            if record["images_seen"] <= images_seen:
                kept.append(f"{line}\n")
                records.append(record)
        try:
            write_text(self.path, "".join(kept))
        except OSError as error:
            raise StorageError(
                f"{self.path} cannot be written: {error.strerror}",
                key="hydra.run.dir",
                remedy="Free space, and resume with resume=auto.",
            ) from error
        return records


def remove_later_files(run: RunFolder, images_seen: int) -> None:
    """Removes the samples and validations of more images, which an earlier process has left.

    The run that goes on from its checkpoint makes its own, or ends before.
    """
    for folder in (run.validation, run.samples):
        for path in folder.glob("*"):
            seen = images_seen_of(path)
            if seen is not None and seen > images_seen:
                with contextlib.suppress(OSError):
                    path.unlink()
