"""Measure whether pictures follow the depth map that they were given, and their caption."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdtrain import pictures
from sdtrain.data.shapes import COLOURS, RADII, SHAPES, Attributes, Shapes, coverage
from sdtrain.errors import UserError
from sdtrain.evaluation.metric import Measurement, Metric, percent
from sdtrain.evaluation.subject import Subject
from sdtrain.evaluation.verifier import Verifier
from sdtrain.generation.drawing import Request
from sdtrain.types import Row

SPLITS = {"trained": "validation", "held_out": "held_out"}
"""Column -> split of the data set: new pictures of trained combinations, and untrained ones."""

ENOUGH = 0.7
"""Least intersection over union at which a shape counts as drawn where its depth map has it."""

GRID_PICTURES = 32


class DepthOverlap(Metric):
    """Intersection over union of the drawn shape and that of the given depth map.

    Beside its mean and the share of pictures with at least 0.7: the shares in which colour and
    background are those of the caption. One column is for combinations of shape and colours that
    were trained, another for those that were held out. It recognises flat shapes, so the run must
    use data=shapes.
    """

    gives = frozenset({"caption", "label", "depth"})
    unit = "share"
    higher_is_better = True

    def __init__(self) -> None:
        self.verifier = Verifier(shapes=SHAPES, palette=COLOURS, radii=RADII, coverage=coverage)

    def check(self, subject: Subject) -> None:
        if not issubclass(subject.data_source.data_class, Shapes):
            raise UserError(
                "recognises flat shapes only: it needs a run with data=shapes",
                key="metrics",
                value="depth_overlap",
                remedy="Choose another metric.",
            )
        if "depth" not in subject.reads:
            raise UserError(
                "needs a model that reads depth maps",
                key="metrics",
                value="depth_overlap",
                remedy="Choose another metric, or train with model/channels=[depth].",
            )

    def measure(self, subject: Subject) -> Measurement:
        columns = {}
        sheets = {}
        for name, split_name in SPLITS.items():
            split = subject.data.split(split_name)
            rows = []
            requests = []
            attributes = []
            for number in range(subject.num_images):
                index = (subject.seed + number) % len(split)
                row = split[(index, index)]
                rows.append(row)
                attributes.append(split.attributes(index))
                request = Request(
                    subject.seed + number, prompt=row.caption, label=row.label, depth=row.depth
                )
                requests.append(request)
            images = subject.draw(requests)
            columns[name] = self._values(images, rows, attributes)
            sheets[name] = _sheet(images[:GRID_PICTURES], rows[:GRID_PICTURES])
        return Measurement(columns, sheets)

    def _values(
        self, images: Tensor, rows: Sequence[Row], attributes: Sequence[Attributes]
    ) -> dict[str, float]:
        overlaps = []
        for image, row in zip(images, rows, strict=True):
            drawn = self.verifier.covered(image) > 0.5
            overlaps.append(intersection_over_union(drawn, row.depth[0].numpy() > 0))
        colours = []
        backgrounds = []
        for reading, expected in zip(self.verifier(images), attributes, strict=True):
            colours.append(reading.colour == expected.colour)
            backgrounds.append(reading.background == expected.background)
        return {
            "overlap": float(np.mean(overlaps)),
            "overlap_from_0.7": float(np.mean(np.array(overlaps) >= ENOUGH)),
            "colour": float(np.mean(colours)),
            "background": float(np.mean(backgrounds)),
        }

    def format(self, value: float) -> str:
        return percent(value)


def intersection_over_union(one: np.ndarray, other: np.ndarray) -> float:
    """Return |A and B| / |A or B| of two masks [H, W] bool; 1 if both are empty."""
    union = np.logical_or(one, other).sum()
    return float(np.logical_and(one, other).sum() / union) if union else 1.0


def _sheet(images: Tensor, rows: Sequence[Row]) -> Image.Image:
    """Return a grid of depth maps, each beside the picture drawn from it."""
    shown = []
    titles = []
    for image, row in zip(images, rows, strict=True):
        shown += [(2 * row.depth - 1).expand(3, -1, -1), image]
        titles += ["", row.caption]
    return pictures.grid(torch.stack(shown), titles, columns=8)
