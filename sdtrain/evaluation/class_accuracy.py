"""Measure whether pictures of a class-conditional model show their class."""

from dataclasses import dataclass

import numpy as np

from sdtrain import pictures
from sdtrain.data.shapes import COLOURS, NUM_CLASSES, RADII, SHAPES, Shapes, coverage
from sdtrain.errors import UserError
from sdtrain.evaluation.metric import Measurement, Metric, percent
from sdtrain.evaluation.subject import Subject
from sdtrain.evaluation.verifier import Verifier
from sdtrain.generation.drawing import Request

GRID_PICTURES = 64


@dataclass(frozen=True)
class ShapeClass:
    """A class of the drawn shapes: a shape and its colour."""

    shape: str
    colour: str

    @classmethod
    def of(cls, label: int) -> "ShapeClass":
        """Return the class of a label, see `shapes.label_of`."""
        shape, colour = divmod(label, len(COLOURS))
        return cls(SHAPES[shape], list(COLOURS)[colour])


class ClassAccuracy(Metric):
    """Share of pictures in which a verifier recognises the shape and the colour of the class.

    The classes are drawn in turn. The verifier recognises flat shapes, so the run must use
    data=shapes.
    """

    gives = frozenset({"label"})
    unit = "share of the pictures"
    higher_is_better = True

    def __init__(self) -> None:
        self.verifier = Verifier(shapes=SHAPES, palette=COLOURS, radii=RADII, coverage=coverage)

    def check(self, subject: Subject) -> None:
        if not issubclass(subject.data_source.data_class, Shapes) or "label" not in subject.reads:
            raise UserError(
                "reads classes of flat shapes: it needs a run with data=shapes and "
                "model/conditioner=class_label",
                key="metrics",
                value="class_accuracy",
                remedy="Choose another metric.",
            )

    def measure(self, subject: Subject) -> Measurement:
        requests = []
        for number in range(subject.num_images):
            requests.append(Request(subject.seed + number, label=number % NUM_CLASSES))
        images = subject.draw(requests)
        shapes = []
        colours = []
        titles = []
        for request, reading in zip(requests, self.verifier(images), strict=True):
            wanted = ShapeClass.of(request.label)
            shapes.append(reading.shape == wanted.shape)
            colours.append(reading.colour == wanted.colour)
            titles.append(f"{wanted.colour} {wanted.shape}")
        both = np.logical_and(shapes, colours)
        shares = {"shape": shapes, "colour": colours, "both": both}
        column = {name: float(np.mean(right)) for name, right in shares.items()}
        sheet = pictures.grid(images[:GRID_PICTURES], titles[:GRID_PICTURES], columns=8)
        return Measurement({"classes": column}, {"": sheet})

    def format(self, value: float) -> str:
        return percent(value)
