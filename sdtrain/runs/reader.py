"""Read what a run has written, for comparison with other runs. Builds nothing and needs no torch.

A file that is missing, incomplete or not written by sdtrain is treated as empty, so that one odd
run does not prevent a comparison.
"""

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdtrain.errors import StorageError, UserError
from sdtrain.runs.config import read_config
from sdtrain.runs.layout import CONFIG, EvaluationFolder, RunFolder, SweepFolder
from sdtrain.runs.lock import has_stale_lock
from sdtrain.runs.metrics import read_metrics
from sdtrain.runs.status import read_status

Series = tuple[list[int], list[float], list[float]]
"""(images seen, seconds, values) of one logged number."""


@dataclass(eq=False)
class RunRecord:
    """The contents of a run's folder.

    Args:
        name: unique among the runs that are read together.
        folder: of the run.
        config: as it was saved; empty if there is none or it cannot be read.
        state: as in status.json; "killed" if the process ended without writing one; or a phrase.
        exit_code: of the process.
        images_seen: by the run.
        peak_memory_mb: largest memory that the run has used.
        lines: the readable records of metrics.jsonl.
        raw_validations: the records of the noise-level validation in validation/, in order.
        trained_by: the arm of its sweep whose weights it copied; None if it was trained itself.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    state: str
    exit_code: int | None
    images_seen: int
    peak_memory_mb: float | None = None
    lines: list[dict] = field(default_factory=list)
    raw_validations: list[dict] = field(default_factory=list)
    trained_by: str | None = None

    def series(self, key: str) -> Series:
        """Return the logged values of `key`, with images seen and seconds of each."""
        images_seen = []
        seconds = []
        values = []
        for line in self.lines:
            if isinstance(line.get(key), int | float):
                images_seen.append(line["images_seen"])
                seconds.append(line["seconds"])
                values.append(line[key])
        return images_seen, seconds, values

    @property
    def speed(self) -> float | None:
        """Median number of images per second."""
        _, _, values = self.series("train/images_per_second")
        values = sorted(values)
        return values[len(values) // 2] if values else None

    @property
    def evaluation(self) -> dict:
        """What sdtrain-evaluate measured; empty if it was not run."""
        return read_evaluation(RunFolder(self.folder).evaluation.path)


def read_evaluation(folder: Path) -> dict:
    """Return the numbers that sdtrain-evaluate wrote to `folder`; empty if there are none."""
    with contextlib.suppress(OSError, ValueError):
        numbers = json.loads(EvaluationFolder(folder).numbers.read_text(encoding="utf-8"))
        return numbers if isinstance(numbers, dict) else {}
    return {}


def find_runs(folders: list[Path]) -> list[RunRecord]:
    """Read the runs in these folders, each the folder of a run or of a sweep.

    Raises UserError if a folder holds no run.
    """
    names = {}
    for folder in folders:
        for run in _runs_in(folder):
            names[run.resolve()] = run.name
    return [read_run(name, folder) for folder, name in _make_unique(names).items()]


def _runs_in(folder: Path) -> list[Path]:
    """Return the run folders in `folder`, or `folder` itself if it is one. Raises UserError."""
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder",
            key="FOLDER",
            remedy="Give the folder of a run or of a sweep.",
        )
    if RunFolder(folder).config.is_file():
        return [folder.resolve()]
    arms = sweep_arms(folder)
    if not arms:
        first_stage = SweepFolder(folder).first_stage.path
        configs = sorted(folder.glob(SweepFolder(folder).arm_configs))
        arms = [path.parent for path in configs if path.parent != first_stage]
    if not arms:
        raise UserError(
            f"{folder} holds no runs: a run has a {CONFIG}, a sweep has runs in it",
            key="FOLDER",
            remedy="Give a folder that `sdtrain` has written.",
        )
    return arms


def _make_unique(names: dict[Path, str]) -> dict[Path, str]:
    """Return {folder: name}, each name with as much of the path as makes all of them unique."""
    unique = {folder: printable(name) for folder, name in names.items()}
    longest = max(len(folder.parts) for folder in names)
    for parts in range(2, longest + 1):
        if len(set(unique.values())) == len(unique):
            return unique
        for folder in names:
            unique[folder] = printable("/".join(folder.parts[-parts:]))
    return unique


def printable(name: str) -> str:
    """Replace what cannot be encoded: the name of a folder may be any bytes."""
    return name.encode(errors="replace").decode()


def sweep_arms(folder: Path) -> list[Path] | None:
    """Return the arms of a sweep in its own order, including those that never started.

    None if the folder is not that of a sweep.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        sweep = SweepFolder(folder)
        record = json.loads(sweep.record.read_text(encoding="utf-8"))
        return [sweep.arm(name).path for name in record["arms"]]
    return None


def read_run(name: str, folder: Path) -> RunRecord:
    """Read whatever the folder holds of a run. Raises nothing."""
    files = RunFolder(folder)
    status = read_status(files)
    config = _read_config_or_empty(files.config)
    state = str(status.get("state", "unknown"))
    if not config and files.config.exists():
        state = f"with a {files.config.name} that cannot be read"
    elif not config and state in ("unknown", "finished"):
        # A run that was refused when it was built has the state "failed" instead.
        state = "not started"
    lines = read_metrics(files.metrics)
    images_seen = _number(status, "images_seen") or 0
    if state == "running":
        if lines:
            images_seen = lines[-1]["images_seen"]
        if has_stale_lock(folder):
            state = "killed"
    return RunRecord(
        name,
        folder,
        config,
        state,
        _number(status, "exit_code"),
        images_seen,
        peak_memory_mb=_number(status, "peak_memory_mb"),
        lines=lines,
        raw_validations=_read_validations(files.validation),
        trained_by=_read_trained_by(files.trained_by),
    )


def _read_config_or_empty(path: Path) -> dict[str, Any]:
    with contextlib.suppress(StorageError):
        return read_config(path)
    return {}


def _read_trained_by(path: Path) -> str | None:
    with contextlib.suppress(OSError, ValueError):
        return path.read_text().strip()
    return None


def _number(status: dict, key: str) -> int | float | None:
    value = status.get(key)
    return value if isinstance(value, int | float) else None


def _read_validations(folder: Path) -> list[dict]:
    records = []
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(OSError, ValueError):
            record = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(record, dict):
                records.append(record)
    return records
