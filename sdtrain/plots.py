"""Numbers to pictures for people."""

import io
import math
import warnings
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from sdtrain import pictures

PAIR = ("-", "--", ":", "-.")
SIZE = (7.2, 4.2)  # inches, at 110 pixels each


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
        axes.plot(
            x,
            line,
            label=name,
            color=f"C{number % 10}",
            linestyle=PAIR[number // 10 % 4],
            linewidth=1.6,
        )
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    axes.legend(fontsize="small")
    return rendered(figure)


def sampler_errors(
    drawn: dict[int, Tensor], far: dict[int, Tensor], heads: list[str], columns: int = 8
) -> tuple[Image.Image, Image.Image]:
    """(pictures by their number of steps, a row each; the distances from the most steps over steps), see generate.by_steps."""
    rows = [
        (f"{steps} steps", [pictures.picture(image) for image in images[:columns]])
        for steps, images in drawn.items()
    ]
    figure, axes = canvas(SIZE)
    for name, measure in (("mean", torch.Tensor.mean), ("largest", torch.Tensor.max)):
        axes.plot(
            list(far),
            [measure(each).item() or math.nan for each in far.values()],
            label=name,
            marker="o",
            linewidth=1.6,
        )  # 0 has no logarithm
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


def canvas(size: tuple[float, float], rows: int = 1, columns: int = 1, **shared: bool):
    """(figure, axes) without pyplot, whose global state would keep every figure of a long run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, **shared)


def rendered(figure) -> Image.Image:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Glyph .* missing from font"
        )  # a name in another script is drawn as boxes
        figure.savefig(file, format="png", dpi=110)
    return Image.open(file).convert("RGB")
