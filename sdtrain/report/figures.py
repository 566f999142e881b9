"""The plots of a report, as pictures."""

import math
import textwrap

import torch
from PIL import Image
from torch import Tensor

from sdtrain.diffusion.effective_weight import EffectiveWeight
from sdtrain.evaluation.noise_level_error import BITS, LEVELS, bits_over
from sdtrain.plots import LOG_SNR, canvas, line_style, rendered
from sdtrain.report.compare import Arm, Comparison, sides
from sdtrain.report.record import MeasuredRun
from sdtrain.report.statistics import half_width, quantile_for

WIDTH = 9.0
HEIGHT = 4.4
"""Of a plot, in inches."""


def in_legend(name: str) -> str:
    """A name so that matplotlib shows it as it is.

    It takes what is between dollars for a formula, and a name that begins with _ for none.
    """
    hidden = " " if name.startswith("_") else ""
    return f"{hidden}{name}".replace("$", r"\$")


def add_legend(figure, axis) -> None:
    """Of the lines of one axis: in it, or below all axes where names are many or long."""
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


def levels(comparison: Comparison) -> Image.Image:
    """Error by level beside the linear denoiser's, and the difference to the baseline below."""
    figure, (above, below) = canvas((WIDTH, 1.7 * HEIGHT), rows=2, share_x=True)
    base = comparison.baseline
    linear = base.used[0].last.found.linear[: len(base.errors)].mean(0)
    above.plot(LEVELS, linear, color="0.6", linewidth=1, label="linear denoiser")
    for number, arm in enumerate(comparison.arms):
        style = line_style(number)
        mean = torch.where(arm.inside, arm.errors.mean(0), math.nan)
        above.plot(LEVELS, mean, label=in_legend(arm.name), linewidth=1.6, **style)
        if arm is not base:
            _plot_difference(below, arm, base, style)
    above.set(
        ylabel="mean squared error of epsilon",
        title="Error by noise level, where the schedule reaches",
        yscale="log",
    )
    below.axhline(0, color="0.4", linewidth=1)
    name = textwrap.shorten(base.name.replace(",", ", "), 70, placeholder=" ...")
    below.set(
        xlabel=LOG_SNR,
        ylabel="bits per dimension",
        title=f"Less {in_legend(name)}, with 95 % over {comparison.over}",
    )
    add_legend(figure, above)
    return rendered(figure)


def _plot_difference(axes, arm: Arm, base: Arm, style: dict[str, str]) -> None:
    """Bits at each level that both reach."""
    both = arm.inside & base.inside
    mine, theirs, _ = sides(arm, base)
    gap = (mine - theirs) * BITS
    middle = gap.mean(0)
    half = quantile_for(len(gap)) * gap.std(0) / math.sqrt(len(gap))
    axes.plot(LEVELS, torch.where(both, middle, math.nan), linewidth=1.6, **style)
    low = middle - half
    high = middle + half
    axes.fill_between(LEVELS, low, high, where=both, alpha=0.2, color=style["color"])


def learning(comparison: Comparison) -> Image.Image:
    """Bits on the common levels and the common pictures, against images and against time.

    Bars are of the difference to the baseline.
    """
    figure, axes = canvas((WIDTH, HEIGHT), columns=2)
    counts = []
    for arm in comparison.arms:
        for run in arm.runs:
            counts += [len(look.pictures) for look in run.validations]
    count = min(counts)
    weights = bits_over(comparison.inside)
    theirs = {run.seed: _bits_by_look(run, weights, count) for run in comparison.baseline.used}
    for number, arm in enumerate(comparison.arms):
        for run in arm.runs:
            label = in_legend(arm.name) if run is arm.runs[0] else None
            mine = _bits_by_look(run, weights, count)
            half = _half_widths(mine, theirs.get(run.seed, {}))
            means = [bits.mean() for bits in mine.values()]
            style = line_style(number) | {"marker": "o", "markersize": 3, "linewidth": 1.4}
            for axis, x in zip(axes, (list(mine), _minutes(run, mine)), strict=True):
                axis.errorbar(x, means, yerr=half, capsize=2, label=label, **style)
    axes[0].set(
        xlabel="images seen",
        ylabel="bits per dimension",
        title=f"On the {count} pictures that every look has seen",
    )
    axes[1].set(xlabel="minutes of training and looking")
    if len(comparison.arms) > 1:
        axes[1].set(title="Bars: 95 % of the difference to the baseline")
    add_legend(figure, axes[0])
    return rendered(figure)


def _bits_by_look(run: MeasuredRun, weights: Tensor, count: int) -> dict[int, Tensor]:
    """{images seen: bits [count] of the first pictures}."""
    looks = {}
    for look in run.validations:
        looks[look.images_seen] = (look.found.errors @ weights)[:count]
    return looks


def _half_widths(mine: dict[int, Tensor], theirs: dict[int, Tensor]) -> list[float]:
    """Half of the 95 % interval of the difference at each look.

    NaN where there is none, as for the baseline itself.
    """
    widths = []
    for seen, bits in mine.items():
        half = half_width(bits - theirs[seen]) if seen in theirs else math.nan
        widths.append(half if 0 < half < math.inf else math.nan)
    return widths


def _minutes(run: MeasuredRun, looks: dict[int, Tensor]) -> list[float]:
    """When each look was taken, NaN where that is not known."""
    seen, clock, _ = run.series("validation/bits_per_dim")
    when = dict(zip(seen, clock, strict=True))
    return [when.get(at, math.nan) / 60 for at in looks]


def weights(named: dict[str, EffectiveWeight]) -> Image.Image:
    """The effective weight of each."""
    figure, axis = canvas((WIDTH, HEIGHT))
    for number, (name, shown) in enumerate(named.items()):
        style = line_style(number)
        axis.plot(shown.log_snr, shown.weight, label=in_legend(name), linewidth=1.6, **style)
    axis.set(
        xlabel=LOG_SNR,
        ylabel="density x weight, unit area",
        title="Effective weight on the error of epsilon",
        yscale="log",
        ylim=(1e-4, None),
    )
    add_legend(figure, axis)
    return rendered(figure)
