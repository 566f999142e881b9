"""The plots of a report, as pictures."""

import io
import json
import math

import torch
from PIL import Image
from torch import Tensor

from sdtrain.metrics.noise_level_error import BITS, LEVELS, standard_error
from sdtrain.plots import canvas, rendered
from sdtrain.report.compare import Arm, Comparison
from sdtrain.report.runs import RunRecord

WIDE, TALL = 9.0, 4.4  # inches


def colour(number: int) -> dict:
    return {"color": f"C{number % 10}", "linestyle": ("-", "--", ":", "-.")[number // 10 % 4]}


def levels(comparison: Comparison) -> Image.Image:
    """Error by level against the linear denoiser, and the difference to the baseline with its interval; the winner of each level below."""
    figure, (above, below) = canvas((WIDE, 1.7 * TALL), rows=2, sharex=True)
    base = comparison.baseline.runs[0].last.found
    above.plot(LEVELS, base.linear.mean(0), color="0.6", linewidth=1, label="linear denoiser")
    for number, arm in enumerate(comparison.arms):
        found = arm.runs[0].last.found
        line = torch.where(found.inside, found.errors.mean(0), math.nan)
        above.plot(LEVELS, line, label=arm.name, linewidth=1.6, **colour(number))
        if arm is not comparison.baseline:
            count = min(len(found.errors), len(base.errors))
            both = found.inside & base.inside
            gap = (found.errors[:count] - base.errors[:count]) * BITS
            middle, half = gap.mean(0), 1.96 * gap.std(0) / math.sqrt(count)
            below.plot(LEVELS, torch.where(both, middle, math.nan), linewidth=1.6, **colour(number))
            below.fill_between(LEVELS, middle - half, middle + half, where=both, alpha=0.2, color=colour(number)["color"])
    above.set(ylabel="mean squared error of epsilon", title="Error by noise level, where the schedule reaches", yscale="log")
    below.axhline(0, color="0.4", linewidth=1)
    below.set(xlabel="log_snr (noise on the left, data on the right)", ylabel="bits per dimension", title=f"Less {comparison.baseline.name}, with 95 %")
    above.legend(fontsize="small")
    return rendered(figure)


def winners(comparison: Comparison) -> list[tuple[float, str]]:
    """(log_snr, the arm with the lowest error there) at the levels that all reach."""
    means = torch.stack([arm.runs[0].last.found.errors.mean(0) for arm in comparison.arms])
    lowest = means.argmin(0).tolist()
    return [(LEVELS[place].item(), comparison.arms[lowest[place]].name) for place in comparison.inside.nonzero().flatten().tolist()]


def learning(comparison: Comparison) -> Image.Image:
    """Bits on the common levels and the common pictures, against images and against time."""
    figure, axes = canvas((WIDE, TALL), columns=2)
    runs = [(number, run) for number, arm in enumerate(comparison.arms) for run in arm.runs]
    count = min(len(look.pictures) for _, run in runs for look in run.validations)
    for number, run in runs:
        seen, clock, _ = run.series("validation/bits_per_dim")
        when = dict(zip(seen, clock, strict=True))
        bits = [((look.found.errors * comparison.inside) @ BITS)[:count] for look in run.validations]
        middle, half = torch.stack([each.mean() for each in bits]), [1.96 * standard_error(each) if count > 1 else 0 for each in bits]
        label = comparison.arms[number].name if run is comparison.arms[number].runs[0] else None
        images = [look.images_seen for look in run.validations]
        for axis, x in zip(axes, (images, [when.get(seen, math.nan) / 60 for seen in images]), strict=True):
            axis.errorbar(x, middle, yerr=half, marker="o", markersize=3, linewidth=1.4, capsize=2, label=label, **colour(number))
    axes[0].set(xlabel="images seen", ylabel="bits per dimension", title=f"On the {count} pictures that every look has seen")
    axes[1].set(xlabel="minutes of training and looking")
    axes[0].legend(fontsize="small")
    return rendered(figure)


def weights(entries: list[tuple[str, Tensor, Tensor]]) -> Image.Image:
    """(name, log_snr [N], effective weight [N]) of each, of unit area."""
    figure, axis = canvas((WIDE, TALL))
    for number, (name, log_snr, weight) in enumerate(entries):
        axis.plot(log_snr, weight, label=name, linewidth=1.6, **colour(number))
    axis.set(xlabel="log_snr", ylabel="density x weight, unit area", title="Effective weight on the error of epsilon", yscale="log", ylim=(1e-4, None))
    axis.legend(fontsize="small")
    return rendered(figure)


def samples(arms: list[Arm], columns: int = 8) -> Image.Image | None:
    """The last pictures of each arm, a row each, under common prompts; None where there are none."""
    from sdtrain.pictures import strip_of_rows

    rows, prompts = [], None
    for arm in arms:
        pictures, said = last_pictures(arm.runs[0])
        if pictures and (prompts is None or said == prompts):
            rows.append((arm.name, pictures[:columns]))
            prompts = said
    return strip_of_rows(rows, [each["prompt"] or f"seed {each['seed']}" for each in prompts[:columns]]) if rows else None


def last_pictures(run: RunRecord) -> tuple[list[Image.Image], list[dict]]:
    """The newest of samples/pictures-*.png cut into its pictures, and what each was asked for."""
    for path in sorted((run.folder / "samples").glob("pictures-*.png"), reverse=True):
        try:
            sheet = Image.open(path)
            asked = json.loads(sheet.text["sdtrain"])["requests"]
            side = sheet.width // len(asked)
            return [sheet.crop((i * side, 0, (i + 1) * side, sheet.height)) for i in range(len(asked))], asked
        except (OSError, KeyError, ValueError, AttributeError):
            continue
    return [], []


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return file.getvalue()


