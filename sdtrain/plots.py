"""Numbers to pictures for people."""

import io
import math
import warnings
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from sdtrain import pictures
from sdtrain.fonts import families

LINE_STYLES = ("-", "--", ":", "-.")
SIZE = (7.2, 4.2)
"""Of a figure in inches, at DPI pixels each."""
DPI = 110
LOG_SNR = "log_snr (noise on the left, data on the right)"
"""Of the axis, which runs this way in every plot and every table."""


def curves(
    x: Tensor | Sequence,
    lines: dict[str, Tensor | Sequence],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
) -> Image.Image:
    """Lines over a common x, NaN where there is none."""
    figure, axes = canvas(SIZE)
    for number, (name, line) in enumerate(lines.items()):
        axes.plot(x, line, label=name, linewidth=1.6, **line_style(number))
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    axes.legend(fontsize="small")
    return rendered(figure)


def line_style(number: int) -> dict[str, str]:
    """Colour and dashes of a plot's line: ten colours, then the same ones dashed."""
    style = LINE_STYLES[number // 10 % len(LINE_STYLES)]
    return {"color": f"C{number % 10}", "linestyle": style}


def sampler_errors(
    drawn: dict[int, Tensor], far: dict[int, Tensor], heads: list[str], columns: int = 8
) -> tuple[Image.Image, Image.Image]:
    """(pictures, a row for each number of steps; their distances from the most steps).

    drawn: {steps: pictures [N, 3, H, W] in [-1, 1]}. far: {steps: distance [N]}. heads: N captions.
    """
    rows = []
    for steps, images in drawn.items():
        rows.append((f"{steps} steps", [pictures.picture(image) for image in images[:columns]]))
    figure, axes = canvas(SIZE)
    for name, measure in (("mean", torch.Tensor.mean), ("largest", torch.Tensor.max)):
        # 0 has no logarithm.
        distances = [measure(each).item() or math.nan for each in far.values()]
        axes.plot(list(far), distances, label=name, marker="o", linewidth=1.6)
    axes.set(
        xlabel="steps",
        ylabel=f"distance from {max(drawn)} steps, share of the range",
        xscale="log",
        yscale="log",
    )
    axes.set_xticks(list(far), labels=[str(steps) for steps in far])
    axes.minorticks_off()
    axes.legend(fontsize="small")
    return pictures.strip_of_rows(rows, heads[:columns]), rendered(figure)


def empty_figure(size: tuple[float, float]):
    """A figure of a size in inches, made without pyplot.

    Its global state would keep every figure of a long run.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def canvas(size: tuple[float, float], rows: int = 1, columns: int = 1, *, share_x: bool = False):
    """(figure, its axes). size: in inches."""
    figure = empty_figure(size)
    return figure, figure.subplots(rows, columns, sharex=share_x)


def rendered(figure) -> Image.Image:
    """The finished picture of a figure, with light grids."""
    from matplotlib.text import Text

    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for text in figure.findobj(Text):
        if not text.get_text().isascii():
            text.set_fontfamily(families(text.get_text()))
    file = io.BytesIO()
    with warnings.catch_warnings():
        # A letter that no font has is drawn as a box; `families` has warned of it.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(file, format="png", dpi=DPI)
    return Image.open(file).convert("RGB")
