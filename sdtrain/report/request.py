"""The arguments of sdtrain-report, checked without torch."""

from dataclasses import dataclass
from pathlib import Path

from sdtrain.errors import UserError
from sdtrain.paths import expand_home
from sdtrain.runs.layout import ReportFolder, SweepFolder
from sdtrain.runs.reader import RunRecord, find_runs


@dataclass(frozen=True)
class ReportRequest:
    """The runs to compare, the name of the baseline, and the folder to write to.

    baseline: the name of a run or an arm, or None.
    """

    runs: list[RunRecord]
    baseline: str | None
    output: ReportFolder


def read_request(folders: list[Path], baseline: str | None, output: Path | None) -> ReportRequest:
    """Read the runs in the folders.

    Raises UserError where the folders hold no run, or no run or arm with the baseline's name.
    """
    folders = [Path(expand_home(str(folder))) for folder in folders]
    runs = find_runs(folders)
    names = {run.name for run in runs} | {without_seed(run.name) for run in runs}
    if baseline is not None and baseline not in names:
        raise UserError(
            f"--baseline {baseline} is none of the runs",
            key="--baseline",
            allowed=", ".join(run.name for run in runs),
        )
    if output:
        report_folder = ReportFolder(Path(expand_home(str(output))))
    else:
        report_folder = SweepFolder(folders[0]).report
    return ReportRequest(runs, baseline, report_folder)


def without_seed(name: str) -> str:
    """Return the name of a run without its "seed=..." part: the name of its arm."""
    parts = [part for part in name.split(",") if not part.startswith("seed=")]
    return ",".join(parts) or name
