"""The plots of a report, as pictures."""

import io
import json
import math
import textwrap

import torch
from PIL import Image
from torch import Tensor

from sdtrain.evaluation.noise_level_error import BITS, LEVELS, bits_over, standard_error
from sdtrain.plots import canvas, rendered
from sdtrain.report.compare import Arm, Comparison, seed, sides, t_quantile
from sdtrain.runs.reader import RunRecord

WIDE, TALL = 9.0, 4.4  # inches


def colour(number: int) -> dict:
    return {"color": f"C{number % 10}", "linestyle": ("-", "--", ":", "-.")[number // 10 % 4]}


def said(name: str) -> str:
    """A name as matplotlib shows it: it takes what is between dollars for a formula, and what begins with _ for nothing."""
    return f"{' ' if name.startswith('_') else ''}{name}".replace("$", r"\$")


def legend(figure, axis) -> None:
    """Of the lines of one axis: in it, or below all axes where names are many or long."""
    handles, names = axis.get_legend_handles_labels()
    longest = max(map(len, names), default=0)
    if len(names) <= 6 and longest <= 32:
        axis.legend(fontsize="small")
        return
    columns = max(1, min(4, 110 // (longest + 6)))
    figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(names) / columns))
    figure.legend(
        handles,
        [textwrap.shorten(name, 120, placeholder=" ...") for name in names],
        loc="outside lower center",
        ncols=columns,
        fontsize="small",
    )


def levels(comparison: Comparison) -> Image.Image:
    """Error by level against the linear denoiser, and the difference to the baseline with its interval over pictures."""
    figure, (above, below) = canvas((WIDE, 1.7 * TALL), rows=2, sharex=True)
    base = comparison.baseline
    above.plot(
        LEVELS,
        base.used[0].last.found.linear[: len(base.errors)].mean(0),
        color="0.6",
        linewidth=1,
        label="linear denoiser",
    )
    for number, arm in enumerate(comparison.arms):
        above.plot(
            LEVELS,
            torch.where(arm.inside, arm.errors.mean(0), math.nan),
            label=said(arm.name),
            linewidth=1.6,
            **colour(number),
        )
        if arm is not base:
            both = arm.inside & base.inside
            mine, theirs, _ = sides(arm, base)
            gap = (mine - theirs) * BITS
            middle, half = (
                gap.mean(0),
                t_quantile(max(1, len(gap) - 1)) * gap.std(0) / math.sqrt(len(gap)),
            )
            below.plot(LEVELS, torch.where(both, middle, math.nan), linewidth=1.6, **colour(number))
            below.fill_between(
                LEVELS,
                middle - half,
                middle + half,
                where=both,
                alpha=0.2,
                color=colour(number)["color"],
            )
    above.set(
        ylabel="mean squared error of epsilon",
        title="Error by noise level, where the schedule reaches",
        yscale="log",
    )
    below.axhline(0, color="0.4", linewidth=1)
    title = f"Less {said(textwrap.shorten(base.name.replace(',', ', '), 70, placeholder=' ...'))}, with 95 % over {comparison.over}"
    below.set(
        xlabel="log_snr (noise on the left, data on the right)",
        ylabel="bits per dimension",
        title=title,
    )
    legend(figure, above)
    return rendered(figure)


def learning(comparison: Comparison) -> Image.Image:
    """Bits on the common levels and the common pictures, against images and against time; bars are of the difference to the baseline."""
    figure, axes = canvas((WIDE, TALL), columns=2)
    runs, base = (
        [(number, run) for number, arm in enumerate(comparison.arms) for run in arm.runs],
        comparison.baseline,
    )
    count = min(len(look.pictures) for _, run in runs for look in run.validations)
    bits = {
        id(run): {
            look.images_seen: (look.found.errors @ bits_over(comparison.inside))[:count]
            for look in run.validations
        }
        for _, run in runs
    }
    for number, run in runs:
        seen, clock, _ = run.series("validation/bits_per_dim")
        when, mine = dict(zip(seen, clock, strict=True)), bits[id(run)]
        theirs = next((bits[id(other)] for other in base.used if seed(other) == seed(run)), {})
        half = [
            t_quantile(max(1, count - 1)) * standard_error(each - theirs[at])
            if at in theirs
            else math.nan
            for at, each in mine.items()
        ]
        half = [
            each if 0 < each < math.inf else math.nan for each in half
        ]  # none of the baseline itself
        label = (
            said(comparison.arms[number].name) if run is comparison.arms[number].runs[0] else None
        )
        for axis, x in zip(
            axes, (list(mine), [when.get(at, math.nan) / 60 for at in mine]), strict=True
        ):
            drawn = {
                "marker": "o",
                "markersize": 3,
                "linewidth": 1.4,
                "capsize": 2,
                "label": label,
            } | colour(number)
            axis.errorbar(x, [each.mean() for each in mine.values()], yerr=half, **drawn)
    axes[0].set(
        xlabel="images seen",
        ylabel="bits per dimension",
        title=f"On the {count} pictures that every look has seen",
    )
    axes[1].set(xlabel="minutes of training and looking")
    if len(comparison.arms) > 1:
        axes[1].set(title="Bars: 95 % of the difference to the baseline")
    legend(figure, axes[0])
    return rendered(figure)


def weights(entries: list[tuple[str, Tensor, Tensor]]) -> Image.Image:
    """(name, log_snr [N], effective weight [N]) of each, of unit area."""
    figure, axis = canvas((WIDE, TALL))
    for number, (name, log_snr, weight) in enumerate(entries):
        axis.plot(log_snr, weight, label=said(name), linewidth=1.6, **colour(number))
    axis.set(
        xlabel="log_snr",
        ylabel="density x weight, unit area",
        title="Effective weight on the error of epsilon",
        yscale="log",
        ylim=(1e-4, None),
    )
    legend(figure, axis)
    return rendered(figure)


def samples(arms: list[Arm], columns: int = 8) -> tuple[Image.Image | None, list[str]]:
    """(the last pictures of each arm, a row each, under common seeds and prompts; the arms that have none, or others)."""
    from sdtrain.pictures import strip_of_rows

    found = [(arm.name, *last_pictures(arm.used[0])) for arm in arms]
    asked = [each for _, pictures, each in found if pictures]
    prompts = max(asked, key=asked.count, default=None)  # what most were asked for
    rows = [
        (name, pictures[:columns]) for name, pictures, each in found if pictures and each == prompts
    ]
    without = [name for name, pictures, each in found if not pictures or each != prompts]
    return strip_of_rows(
        rows, [each["prompt"] or f"seed {each['seed']}" for each in prompts[:columns]]
    ) if rows else None, without


def last_pictures(run: RunRecord) -> tuple[list[Image.Image], list[dict]]:
    """The newest of samples/pictures-*.png cut into its pictures, and what each was asked for."""
    for path in sorted((run.folder / "samples").glob("pictures-*.png"), reverse=True):
        try:
            sheet = Image.open(path)
            asked = json.loads(sheet.text["sdtrain"])["requests"]
            side = sheet.width // len(asked)
            return [
                sheet.crop((i * side, 0, (i + 1) * side, sheet.height)) for i in range(len(asked))
            ], asked
        except (OSError, KeyError, ValueError, TypeError, AttributeError, ZeroDivisionError):
            continue
    return [], []


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return file.getvalue()
