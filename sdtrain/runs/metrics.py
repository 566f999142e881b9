"""metrics.jsonl: the numbers that a run logs. Needs no torch.

Lines are appended completely or not at all, and a resumed run removes the lines after its
checkpoint.
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
    """Return one line of metrics.jsonl.

    A number that is not finite becomes null, because JSON has no NaN.
    """
    finite = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
    record = {"images_seen": images_seen, "seconds": round(seconds, 3), **finite, **lists}
    return json.dumps(record) + "\n"


def read_metrics(path: Path) -> list[dict]:
    """Return the records of a metrics.jsonl, with images_seen as int and seconds as float.

    Unreadable lines are skipped. Empty if there is no file.
    """
    records = []
    with contextlib.suppress(OSError):
        for _, record in _read_records(path):
            with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError):
                record["seconds"] = float(record["seconds"])
                records.append(record)
    return records


def _read_records(path: Path) -> list[tuple[str, dict]]:
    """Return (line, parsed record) of each complete line that has images_seen. Raises OSError."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError):
            record = json.loads(line)
            record["images_seen"] = int(record["images_seen"])
            records.append((line, record))
    return records


class MetricsFile:
    """The metrics.jsonl of one run. If the disk is full, lines wait in memory.

    waiting: the lines that are not in the file yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: list[str] = []

    def append(self, line: str) -> str | None:
        """Append the waiting lines and then this one. Returns as `write_waiting` does."""
        self.waiting.append(line)
        return self.write_waiting()

    def write_waiting(self) -> str | None:
        """Append all waiting lines, or none. Return None, or why the file cannot be written."""
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(self.waiting))
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)  # else the next line would continue a partial one
            return f"{self.path} cannot be written: {error.strerror}"
        self.waiting.clear()
        return None

    def truncate_after(self, images_seen: int) -> list[dict]:
        """Remove partial lines and those of more images than `images_seen`. Return the others.

        The resumed run writes the later lines again. Raises StorageError if the file cannot be
        written.
        """
        if not self.path.exists():
            return []
        lines = []
        records = []
        for line, record in _read_records(self.path):
            if record["images_seen"] <= images_seen:
                lines.append(f"{line}\n")
                records.append(record)
        try:
            write_text(self.path, "".join(lines))
        except OSError as error:
            raise StorageError(
                f"{self.path} cannot be written: {error.strerror}",
                key="hydra.run.dir",
                remedy="Free space, and resume with resume=auto.",
            ) from error
        return records


def remove_later_files(run: RunFolder, images_seen: int) -> None:
    """Remove samples and validations of more images than `images_seen`, left by an earlier process.

    The run that is resumed from its checkpoint makes its own, or ends earlier.
    """
    for folder in (run.validation, run.samples):
        for path in folder.glob("*"):
            seen = images_seen_of(path)
            if seen is not None and seen > images_seen:
                with contextlib.suppress(OSError):
                    path.unlink()
