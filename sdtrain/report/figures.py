"""The plots of a report that compares runs."""

import math
import textwrap

import torch
from PIL import Image
from torch import Tensor

from sdtrain.diffusion.effective_weight import EffectiveWeight
from sdtrain.evaluation.noise_level_error import BITS, LEVELS, bits_over
from sdtrain.plots import LOG_SNR, line_style, new_figure, render
from sdtrain.report.compare import Arm, Comparison, paired_errors
from sdtrain.report.record import MeasuredRun
from sdtrain.report.statistics import confidence_half_width, standard_errors_to_95_percent

WIDTH = 9.0
HEIGHT = 4.4
"""The size of a plot in inches."""


def legend_label(name: str) -> str:
    """Return a name escaped so that matplotlib shows it literally.

    matplotlib reads text between dollar signs as a formula, and leaves labels that begin with _
    out of the legend.
    """
    prefix = " " if name.startswith("_") else ""
    return f"{prefix}{name}".replace("$", r"\$")


def add_legend(figure, axis) -> None:
    """Add a legend for the lines of `axis`.

    It is placed inside the axis, or below the whole figure where names are many or long.
    """
    handles, names = axis.get_legend_handles_labels()
    longest = max(map(len, names), default=0)
    if len(names) <= 6 and longest <= 32:
        axis.legend(fontsize="small")
        return
    columns = max(1, min(4, 110 // (longest + 6)))
    rows = math.ceil(len(names) / columns)
    figure.set_figheight(figure.get_figheight() + 0.2 * rows)
    figure.legend(
        handles,
        [textwrap.shorten(name, 120, placeholder=" ...") for name in names],
        loc="outside lower center",
        ncols=columns,
        fontsize="small",
    )


def plot_error_by_level(comparison: Comparison) -> Image.Image:
    """Plot each arm's error by noise level, and below it the difference to the baseline.

    The error of the best linear denoiser is plotted for reference.
    """
    figure, (error_axis, difference_axis) = new_figure((WIDTH, 1.7 * HEIGHT), rows=2, share_x=True)
    base = comparison.baseline
    result = base.runs_used[0].last_validation.result
    linear = result.linear[: len(base.errors)].mean(0)
    error_axis.plot(LEVELS, linear, color="0.6", linewidth=1, label="best linear denoiser")
    for number, arm in enumerate(comparison.arms):
        style = line_style(number)
        mean = torch.where(arm.reached_levels, arm.errors.mean(0), math.nan)
        error_axis.plot(LEVELS, mean, label=legend_label(arm.name), linewidth=1.6, **style)
        if arm is not base:
            _plot_difference(difference_axis, arm, base, style)
    error_axis.set(
        ylabel="mean squared error of epsilon",
        title="Error at the noise levels that each arm's schedule reaches",
        yscale="log",
    )
    difference_axis.axhline(0, color="0.4", linewidth=1)
    name = textwrap.shorten(base.name.replace(",", ", "), 60, placeholder=" ...")
    difference_axis.set(
        xlabel=LOG_SNR,
        ylabel="bits per dimension",
        title=f"Difference to {legend_label(name)}, 95 % intervals over {comparison.samples}",
    )
    add_legend(figure, error_axis)
    return render(figure)


def _plot_difference(axis, arm: Arm, base: Arm, style: dict[str, str]) -> None:
    """Plot the difference in bits, with its interval, at the levels that both arms reach."""
    both_reach = arm.reached_levels & base.reached_levels
    arm_errors, base_errors, _ = paired_errors(arm, base)
    gap = (arm_errors - base_errors) * BITS
    mean = gap.mean(0)
    half = standard_errors_to_95_percent(len(gap)) * gap.std(0) / math.sqrt(len(gap))
    axis.plot(LEVELS, torch.where(both_reach, mean, math.nan), linewidth=1.6, **style)
    low = mean - half
    high = mean + half
    axis.fill_between(LEVELS, low, high, where=both_reach, alpha=0.2, color=style["color"])


def plot_learning_curves(comparison: Comparison) -> Image.Image:
    """Plot bits per dimension at each validation, over images seen and over time.

    They are of the levels that all arms reach and the pictures that all validations have. The
    error bars are 95 % intervals of the difference to the baseline's run of the same seed.
    """
    figure, axes = new_figure((WIDTH, HEIGHT), columns=2)
    count = _common_picture_count(comparison.arms)
    weights = bits_over(comparison.common_levels)
    base_bits = {}
    for run in comparison.baseline.runs_used:
        base_bits[run.seed] = _bits_by_images_seen(run, weights, count)
    for number, arm in enumerate(comparison.arms):
        style = line_style(number) | {"marker": "o", "markersize": 3, "linewidth": 1.4}
        for run in arm.runs:
            label = legend_label(arm.name) if run is arm.runs[0] else None
            bits = _bits_by_images_seen(run, weights, count)
            bars = _half_widths(bits, base_bits.get(run.seed, {}))
            means = [values.mean() for values in bits.values()]
            for axis, x in zip(axes, (list(bits), _minutes(run, bits)), strict=True):
                axis.errorbar(x, means, yerr=bars, capsize=2, label=label, **style)
    axes[0].set(
        xlabel="images seen",
        ylabel="bits per dimension",
        title=f"On the {count} pictures that every validation has",
    )
    axes[1].set(xlabel="minutes, samples and validations included")
    if len(comparison.arms) > 1:
        axes[1].set(title="Bars: 95 % of the difference to the baseline")
    add_legend(figure, axes[0])
    return render(figure)


def _common_picture_count(arms: list[Arm]) -> int:
    """Return the number of pictures in the smallest validation of any run."""
    counts = []
    for arm in arms:
        for run in arm.runs:
            counts += [len(validation.picture_hashes) for validation in run.validations]
    return min(counts)


def _bits_by_images_seen(run: MeasuredRun, weights: Tensor, count: int) -> dict[int, Tensor]:
    """Return {images seen: bits [count] of the first pictures} for each validation of a run."""
    bits = {}
    for validation in run.validations:
        bits[validation.images_seen] = (validation.result.errors @ weights)[:count]
    return bits


def _half_widths(bits: dict[int, Tensor], base_bits: dict[int, Tensor]) -> list[float]:
    """Return half the 95 % interval of the difference to the baseline at each validation.

    NaN where there is none, as for the baseline itself.
    """
    widths = []
    for images_seen, values in bits.items():
        half = math.nan
        if images_seen in base_bits:
            half = confidence_half_width(values - base_bits[images_seen])
        widths.append(half if 0 < half < math.inf else math.nan)
    return widths


def _minutes(run: MeasuredRun, bits: dict[int, Tensor]) -> list[float]:
    """Return the time of each validation in minutes of the run, NaN where it is not known."""
    logged_at, seconds, _ = run.series("validation/bits_per_dim")
    seconds_at = dict(zip(logged_at, seconds, strict=True))
    return [seconds_at.get(images_seen, math.nan) / 60 for images_seen in bits]


def plot_effective_weights(weights: dict[str, EffectiveWeight]) -> Image.Image:
    """Plot the effective weight of each named objective over log_snr."""
    figure, axis = new_figure((WIDTH, HEIGHT))
    for number, (name, weight) in enumerate(weights.items()):
        style = line_style(number)
        axis.plot(weight.log_snr, weight.weight, label=legend_label(name), linewidth=1.6, **style)
    axis.set(
        xlabel=LOG_SNR,
        ylabel="density x weight, unit area",
        title="Effective weight on the squared error of epsilon",
        yscale="log",
        ylim=(1e-4, None),
    )
    add_legend(figure, axis)
    return render(figure)
