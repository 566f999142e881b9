"""What a run has left behind, read for comparison. Nothing of it is built; torch is not needed.

A file that is missing, half or no file of ours counts as nothing: one odd run spoils no comparison.
"""

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdtrain.errors import StorageError, UserError
from sdtrain.runs.config import read_config
from sdtrain.runs.layout import CONFIG, EvaluationFolder, RunFolder, SweepFolder
from sdtrain.runs.lock import left_behind
from sdtrain.runs.metrics import read_metrics
from sdtrain.runs.status import read_status

Series = tuple[list[int], list[float], list[float]]
"""(images seen, seconds, values) of one logged number."""


@dataclass(eq=False)
class RunRecord:
    """A run's folder.

    name: unlike those of the runs read with it.
    config: as it was saved; empty where there is none that can be read.
    state: as in status.json; "killed" where the process ended without writing one; or a phrase.
    lines: of metrics.jsonl, those that can be read.
    looks: the records of the noise-level validation as they lie in validation/, in order.
    trained_by: the arm of its sweep whose weights it was given, None of one that was trained.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    state: str
    exit_code: int | None
    images_seen: int
    peak_memory_mb: float | None = None
    lines: list[dict] = field(default_factory=list)
    looks: list[dict] = field(default_factory=list)
    trained_by: str | None = None

    def series(self, key: str) -> Series:
        """Of the lines that have the key."""
        found: Series = ([], [], [])
        for line in self.lines:
            if isinstance(line.get(key), int | float):
                found[0].append(line["images_seen"])
                found[1].append(line["seconds"])
                found[2].append(line[key])
        return found

    @property
    def speed(self) -> float | None:
        """Median images a second."""
        values = sorted(self.series("train/images_per_second")[2])
        return values[len(values) // 2] if values else None

    @property
    def evaluation(self) -> dict:
        """What sdtrain-evaluate has measured."""
        return read_evaluation(RunFolder(self.folder).evaluation.path)


def read_evaluation(folder: Path) -> dict:
    """What sdtrain-evaluate has left there, or nothing."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(EvaluationFolder(folder).numbers.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def find_runs(folders: list[Path]) -> list[RunRecord]:
    """The runs in these folders, each a run or a sweep. Raises UserError where there is none."""
    named = {}
    for folder in folders:
        for run in _runs_in(folder):
            named[run.resolve()] = run.name
    return [read_run(name, folder) for folder, name in _told_apart(named).items()]


def _runs_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(
            f"{folder} is no folder", key="FOLDER", remedy="Give the folder of a run or of a sweep."
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
            remedy="Give the folder that `sdtrain` has written.",
        )
    return arms


def _told_apart(named: dict[Path, str]) -> dict[Path, str]:
    """{folder: its name, or as much of its path as it takes to tell it from the others}."""
    printed = {folder: printable(name) for folder, name in named.items()}
    longest = max(len(folder.parts) for folder in named)
    for parts in range(2, longest + 1):
        if len(set(printed.values())) == len(printed):
            return printed
        printed = {folder: printable("/".join(folder.parts[-parts:])) for folder in named}
    return printed


def printable(name: str) -> str:
    """A folder may be called by bytes that are no text."""
    return name.encode(errors="replace").decode()


def sweep_arms(folder: Path) -> list[Path] | None:
    """A sweep's arms in its own order, also those that have never begun.

    None where the folder is no sweep's.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        sweep = SweepFolder(folder)
        record = json.loads(sweep.record.read_text(encoding="utf-8"))
        return [sweep.arm(name).path for name in record["arms"]]
    return None


def read_run(name: str, folder: Path) -> RunRecord:
    """Whatever the folder holds of a run. Raises nothing."""
    files = RunFolder(folder)
    status = read_status(files)
    config = _config(files.config)
    state = str(status.get("state", "unknown"))
    if not config and files.config.exists():
        state = f"with a {files.config.name} that cannot be read"
    elif not config and state in ("unknown", "finished"):
        # One that was refused as it was built has failed.
        state = "not begun"
    lines = read_metrics(files.metrics)
    images_seen = _number(status, "images_seen") or 0
    if state == "running":
        if lines:
            images_seen = lines[-1]["images_seen"]
        if left_behind(folder):
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
        looks=_looks(files.validation),
        trained_by=_trained_by(files.trained_by),
    )


def _config(path: Path) -> dict[str, Any]:
    with contextlib.suppress(StorageError):
        return read_config(path)
    return {}


def _trained_by(path: Path) -> str | None:
    with contextlib.suppress(OSError, ValueError):
        return path.read_text().strip()
    return None


def _number(status: dict, key: str) -> int | float | None:
    value = status.get(key)
    return value if isinstance(value, int | float) else None


def _looks(folder: Path) -> list[dict]:
    found = []
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(OSError, ValueError):
            record = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(record, dict):
                found.append(record)
    return found
