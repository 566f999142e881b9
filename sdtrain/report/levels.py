"""Error by noise level, at the end and while training."""

from sdtrain.report import figures
from sdtrain.report.compare import Comparison, winners
from sdtrain.report.section import Picture, Section, Table


def by_level(comparison: Comparison) -> Section:
    """The error at every level, and which arm has the lowest where."""
    parts = [Picture("noise_levels", figures.levels(comparison))]
    if len(comparison.arms) > 1:
        parts.append(_winners_table(comparison))
    return Section("Error by noise level", parts)


def _winners_table(comparison: Comparison) -> Table:
    """Neighbouring levels with one winner share a row."""
    rows: list[list[str]] = []
    for level, name in winners(comparison):
        winner = name or f"none that can be told from the next over {comparison.over}"
        if rows and rows[-1][0] == winner:
            rows[-1][2] = f"{level:g}"
        else:
            rows.append([winner, f"{level:g}", f"{level:g}"])
    return Table(["lowest error", "from log_snr", "to"], rows)


def learning(comparison: Comparison) -> Section:
    """The same number at every look."""
    return Section("While training", [Picture("learning_curves", figures.learning(comparison))])
