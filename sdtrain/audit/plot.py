"""The picture of sdtrain-schedule: log_snr over time, effective weights, levels visited."""

import torch
from PIL import Image

from sdtrain.audit.entries import STEPS, Entry
from sdtrain.diffusion.effective_weight import FARTHEST
from sdtrain.plots import LOG_SNR, empty_figure, line_style, rendered

ROW = 0.42
"""Height in inches of an entry's levels."""


def draw(entries: list[Entry]) -> Image.Image:
    """Two plots over a strip with a row for each entry."""
    strip_height = ROW * len(entries)
    figure = empty_figure((12, 5.4 + strip_height))
    above, below = figure.subfigures(2, 1, height_ratios=(4.4, 1.0 + strip_height))
    curves, weights = above.subplots(1, 2)
    levels = below.subplots()
    _draw_curves(curves, entries)
    _draw_weights(weights, entries)
    _draw_levels(levels, entries)
    return rendered(figure)


def _draw_curves(axes, entries: list[Entry]) -> None:
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    for number, entry in enumerate(entries):
        log_snr = entry.schedule.log_snr(t).clamp(-FARTHEST, FARTHEST)
        axes.plot(t, log_snr, label=entry.name, linewidth=1.6, **line_style(number))
    axes.set(xlabel="t", ylabel="log_snr", title="log_snr over time")
    axes.legend(fontsize="small")


def _draw_weights(axes, entries: list[Entry]) -> None:
    for number, entry in enumerate(entries):
        shown = entry.weight
        if shown is not None:
            axes.plot(shown.log_snr, shown.weight, linewidth=1.6, **line_style(number))
    axes.set(
        xlabel=LOG_SNR,
        ylabel="density x weight, unit area",
        title="effective weight on the error of epsilon",
        yscale="log",
    )
    axes.set_ylim(bottom=1e-4)


def _draw_levels(axes, entries: list[Entry]) -> None:
    for number, entry in enumerate(entries):
        for row, steps in enumerate(entry.steps):
            values = [min(max(value, -FARTHEST), FARTHEST) for value in entry.visited(steps)]
            heights = [len(entries) - number - 0.25 * row] * len(values)
            axes.plot(values, heights, "|", markersize=6, color=line_style(number)["color"])
    numbers = ", ".join(map(str, STEPS))
    grid = entries[0].choice("grid")
    axes.set(
        xlabel=LOG_SNR,
        title=f"levels visited by {numbers} steps (from the top), grid {grid}",
    )
    middles = [len(entries) - number - 0.25 for number in range(len(entries))]
    axes.set_yticks(middles, [entry.name for entry in entries])
    axes.set_ylim(0.2, len(entries) + 0.4)
