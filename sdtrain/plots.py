"""Numbers to pictures for people."""

import io
from collections.abc import Sequence

from PIL import Image
from torch import Tensor

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


def canvas(size: tuple[float, float], rows: int = 1, columns: int = 1):
    """(figure, axes) without pyplot, whose global state would keep every figure of a long run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns)


def rendered(figure) -> Image.Image:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return Image.open(file).convert("RGB")
