"""Plots of numbers."""

import io
import math
import warnings
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from sdtrain import pictures
from sdtrain.fonts import font_families

LINE_STYLES = ("-", "--", ":", "-.")
SIZE = (7.2, 4.2)
"""Width and height of a figure in inches, at DPI pixels each."""
DPI = 110
LOG_SNR = "log_snr (noise on the left, data on the right)"
"""Label of the axis, which has this direction in every plot and table."""


def draw_curves(
    x: Tensor | Sequence,
    lines: dict[str, Tensor | Sequence],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
) -> Image.Image:
    """Draw several lines over a common x. A line has gaps where it is NaN."""
    figure, axes = new_figure(SIZE)
    for number, (name, line) in enumerate(lines.items()):
        axes.plot(x, line, label=name, linewidth=1.6, **line_style(number))
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    axes.legend(fontsize="small")
    return render(figure)


def line_style(number: int) -> dict[str, str]:
    """Return colour and dashes of line `number`: ten colours solid, then the same ones dashed."""
    style = LINE_STYLES[number // 10 % len(LINE_STYLES)]
    return {"color": f"C{number % 10}", "linestyle": style}


def draw_sampler_errors(
    samples: dict[int, Tensor], errors: dict[int, Tensor], heads: list[str], columns: int = 8
) -> tuple[Image.Image, Image.Image]:
    """Draw the samples of several numbers of steps, and a plot of their errors.

    Args:
        samples: {steps: pictures [N, 3, H, W] in [-1, 1]}.
        errors: {steps: distances [N] from the samples with the most steps}.
        heads: N captions.
        columns: number of pictures that are shown of each number of steps.
    """
    rows = []
    for steps, images in samples.items():
        rows.append((f"{steps} steps", [pictures.to_image(image) for image in images[:columns]]))
    figure, axes = new_figure(SIZE)
    for name, statistic in (("mean", torch.Tensor.mean), ("largest", torch.Tensor.max)):
        # NaN leaves out 0, which has no logarithm.
        values = [statistic(each).item() or math.nan for each in errors.values()]
        axes.plot(list(errors), values, label=name, marker="o", linewidth=1.6)
    axes.set(
        xlabel="steps",
        ylabel=f"distance from {max(samples)} steps, as share of the range",
        xscale="log",
        yscale="log",
    )
    axes.set_xticks(list(errors), labels=list(map(str, errors)))
    axes.minorticks_off()
    axes.legend(fontsize="small")
    return pictures.strip_of_rows(rows, heads[:columns]), render(figure)


def empty_figure(size: tuple[float, float]):
    """Return a figure of a size in inches, created without pyplot.

    The global state of pyplot would keep every figure of a long run in memory.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def new_figure(
    size: tuple[float, float], rows: int = 1, columns: int = 1, *, share_x: bool = False
):
    """Return (figure, its axes). size: in inches."""
    figure = empty_figure(size)
    return figure, figure.subplots(rows, columns, sharex=share_x)


def render(figure) -> Image.Image:
    """Add light grid lines to a figure and render it."""
    from matplotlib.text import Text

    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for text in figure.findobj(Text):
        if not text.get_text().isascii():
            text.set_fontfamily(font_families(text.get_text()))
    file = io.BytesIO()
    with warnings.catch_warnings():
        # `font_families` has warned about these already.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(file, format="png", dpi=DPI)
    return Image.open(file).convert("RGB")
