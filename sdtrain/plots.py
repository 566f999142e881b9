"""Numbers to pictures for people."""

import io
from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from sdtrain import pictures

PAIR = ("-", "--", ":", "-.")


def curves(
    x: Tensor | Sequence, lines: dict[str, Tensor | Sequence], *, x_label: str, y_label: str, title: str = "", scale: str = "linear",
    size: tuple[float, float] = (7.2, 4.2),
) -> Image.Image:
    """Lines over a common x, NaN where there is none. scale: of both axes. size: inches, at 110 pixels each."""
    figure, axes = canvas(size)
    for number, (name, line) in enumerate(lines.items()):
        axes.plot(x, line, label=name, color=f"C{number % 10}", linestyle=PAIR[number // 10 % 4], linewidth=1.6)
    axes.set(xlabel=x_label, ylabel=y_label, title=title, xscale=scale, yscale=scale)
    axes.legend(fontsize="small")
    return rendered(figure)


def sampler_errors(drawn: dict[int, Tensor], far: dict[int, Tensor], heads: list[str], columns: int = 8) -> tuple[Image.Image, Image.Image]:
    """(pictures by their number of steps, a row each; the distances from the most steps over steps), see generate.by_steps."""
    rows = [(f"{steps} steps", [pictures.picture(image) for image in images[:columns]]) for steps, images in drawn.items()]
    lines = {"mean": [each.mean().item() for each in far.values()], "largest": [each.max().item() for each in far.values()]}
    plot = curves(list(far), lines, x_label="steps", y_label=f"distance from {max(drawn)} steps, share of the range", scale="log")
    return pictures.strip_of_rows(rows, heads[:columns]), plot


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
    figure.savefig(file, format="png", dpi=110)
    return Image.open(file).convert("RGB")
