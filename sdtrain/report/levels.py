"""The error by noise level at the end of training, and the bits per dimension during it."""

from sdtrain.report import figures
from sdtrain.report.compare import Comparison, winners
from sdtrain.report.section import Picture, Section, Table


def error_by_level_section(comparison: Comparison) -> Section:
    """Return a section with the error at every noise level, and which arm has the lowest where."""
    parts = [Picture("noise_levels", figures.plot_error_by_level(comparison))]
    if len(comparison.arms) > 1:
        parts.append(_winners_table(comparison))
    return Section("Error by noise level", parts)


def _winners_table(comparison: Comparison) -> Table:
    """Return a table of winners, in which neighbouring levels with one winner share a row."""
    rows: list[list[str]] = []
    for level, name in winners(comparison):
        winner = name or f"no significant winner over {comparison.samples}"
        if rows and rows[-1][0] == winner:
            rows[-1][2] = f"{level:g}"
        else:
            rows.append([winner, f"{level:g}", f"{level:g}"])
    return Table(["lowest error", "from log_snr", "to"], rows)


def learning_curves_section(comparison: Comparison) -> Section:
    """Return a section with the bits per dimension at every validation of the runs."""
    curves = Picture("learning_curves", figures.plot_learning_curves(comparison))
    return Section("Bits per dimension during training", [curves])
