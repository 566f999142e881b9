"""The time and memory that the runs took."""

from sdtrain.report.record import MeasuredRun
from sdtrain.report.section import Section, Table

HEADS = ["run", "images seen", "minutes", "images/s", "peak memory, MB"]


def cost_section(runs: list[MeasuredRun]) -> Section:
    """Return a section with a table of one row for each run."""
    rows = []
    for run in runs:
        minutes = run.lines[-1]["seconds"] / 60 if run.lines else 0
        speed = f"{run.speed:.0f}" if run.speed else ""
        memory = f"{run.peak_memory_mb:.0f}" if run.peak_memory_mb else ""
        rows.append([run.name, str(run.images_seen), f"{minutes:.1f}", speed, memory])
    return Section("Speed and memory", [Table(HEADS, rows)])
