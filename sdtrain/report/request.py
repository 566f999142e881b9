"""What sdtrain-report was asked for, checked without torch."""

from dataclasses import dataclass
from pathlib import Path

from sdtrain.errors import UserError
from sdtrain.paths import expanded
from sdtrain.runs.layout import ReportFolder, SweepFolder
from sdtrain.runs.reader import RunRecord, find_runs


@dataclass(frozen=True)
class ReportRequest:
    """Runs to compare; the name of one of them, or of an arm, or None; the folder to write to."""

    runs: list[RunRecord]
    baseline: str | None
    output: ReportFolder


def read_request(folders: list[Path], baseline: str | None, output: Path | None) -> ReportRequest:
    """Reads the runs in the folders. Raises UserError where there is none, or no such baseline."""
    folders = [Path(expanded(str(folder))) for folder in folders]
    output = output and Path(expanded(str(output)))
    runs = find_runs(folders)
    names = {run.name for run in runs} | {without_seed(run.name) for run in runs}
    if baseline is not None and baseline not in names:
        raise UserError(
            f"--baseline {baseline} is none of the runs",
            key="--baseline",
            allowed=", ".join(run.name for run in runs),
        )
    return ReportRequest(
        runs, baseline, ReportFolder(output) if output else SweepFolder(folders[0]).report
    )


def without_seed(name: str) -> str:
    """An arm's name without its seed, which is all that its runs differ by."""
    parts = [part for part in name.split(",") if not part.startswith("seed=")]
    return ",".join(parts) or name
