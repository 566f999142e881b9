"""The picture of sdtrain-schedule: log_snr over time, effective weights and visited levels."""

import torch
from PIL import Image

from sdtrain.audit.entries import STEPS, Entry
from sdtrain.diffusion.effective_weight import LOG_SNR_LIMIT
from sdtrain.plots import LOG_SNR, empty_figure, line_style, render

ROW_HEIGHT = 0.42
"""The height in inches of an entry's row in the plot of visited levels."""


def plot_entries(entries: list[Entry]) -> Image.Image:
    """Plot curves and weights side by side, above the levels visited, a row for each entry."""
    levels_height = ROW_HEIGHT * len(entries)
    figure = empty_figure((12, 5.4 + levels_height))
    above, below = figure.subfigures(2, 1, height_ratios=(4.4, 1.0 + levels_height))
    curve_axis, weight_axis = above.subplots(1, 2)
    level_axis = below.subplots()
    _plot_log_snr(curve_axis, entries)
    _plot_weights(weight_axis, entries)
    _plot_visited_levels(level_axis, entries)
    return render(figure)


def _plot_log_snr(axis, entries: list[Entry]) -> None:
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    for number, entry in enumerate(entries):
        log_snr = entry.schedule.log_snr(t).clamp(-LOG_SNR_LIMIT, LOG_SNR_LIMIT)
        axis.plot(t, log_snr, label=entry.name, linewidth=1.6, **line_style(number))
    axis.set(xlabel="t", ylabel="log_snr", title="log_snr over time")
    axis.legend(fontsize="small")


def _plot_weights(axis, entries: list[Entry]) -> None:
    for number, entry in enumerate(entries):
        effective = entry.weight
        if effective is not None:
            axis.plot(effective.log_snr, effective.weight, linewidth=1.6, **line_style(number))
    axis.set(
        xlabel=LOG_SNR,
        ylabel="density x weight, unit area",
        title="effective weight on the squared error of epsilon",
        yscale="log",
    )
    axis.set_ylim(bottom=1e-4)


def _plot_visited_levels(axis, entries: list[Entry]) -> None:
    ticks = []
    for number, entry in enumerate(entries):
        top = len(entries) - number
        ticks.append(top - 0.25)
        color = line_style(number)["color"]
        for row, steps in enumerate(entry.shown_steps):
            levels = torch.tensor(entry.visited_log_snrs(steps), dtype=torch.float64)
            heights = torch.full_like(levels, top - 0.25 * row)
            axis.plot(
                levels.clamp(-LOG_SNR_LIMIT, LOG_SNR_LIMIT), heights, "|", markersize=6, color=color
            )
    numbers = ", ".join(map(str, STEPS))
    grid = entries[0].option_name("grid")
    axis.set(
        xlabel=LOG_SNR,
        title=f"levels visited in {numbers} steps (from top to bottom), grid {grid}",
    )
    axis.set_yticks(ticks, [entry.name for entry in entries])
    axis.set_ylim(0.2, len(entries) + 0.4)
