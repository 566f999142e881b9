"""Measure whether pictures show what their prompts ask for."""

from collections.abc import Sequence

from torch import Tensor

from sdtrain import pictures
from sdtrain.data.shapes import COLOURS, RADII, SHAPES, Shapes, coverage, evaluation_prompts
from sdtrain.errors import UserError
from sdtrain.evaluation.metric import CAPTIONS, Measurement, Metric, percent
from sdtrain.evaluation.subject import Subject
from sdtrain.evaluation.verifier import HasAttributes, Verifier
from sdtrain.generation.drawing import Request

GRID_PICTURES = 64

SPLITS = {"trained": False, "held_out": True}
"""Column -> whether its combinations of shape and colours were held out of training."""


class PromptAccuracy(Metric):
    """Share of pictures in which a verifier recognises what the prompt asked for.

    One column is for combinations of shape and colours that were trained, another for those that
    were held out. The verifier recognises flat shapes, so the run must use data=shapes.
    """

    needs = frozenset({CAPTIONS})
    gives = frozenset({"caption"})
    unit = "share of the pictures"
    higher_is_better = True

    def __init__(self) -> None:
        self.verifier = Verifier(shapes=SHAPES, palette=COLOURS, radii=RADII, coverage=coverage)

    def check(self, subject: Subject) -> None:
        if not issubclass(subject.data_source.data_class, Shapes):
            raise UserError(
                "recognises flat shapes only: it needs a run with data=shapes",
                key="metrics",
                value="prompt_accuracy",
                remedy="Choose metrics=retrieval for pictures.",
            )

    def measure(self, subject: Subject) -> Measurement:
        columns = {}
        sheets = {}
        for name, held_out in SPLITS.items():
            prompts = []
            expected = []
            requests = []
            pairs = evaluation_prompts(subject.num_images, held_out, subject.seed)
            for number, (prompt, attributes) in enumerate(pairs):
                prompts.append(prompt)
                expected.append(attributes)
                requests.append(Request(subject.seed + number, prompt=prompt))
            images = subject.draw(requests)
            columns[name] = shares_right(self.verifier, images, expected)
            sheets[name] = pictures.grid(images[:GRID_PICTURES], prompts[:GRID_PICTURES], columns=8)
        return Measurement(columns, sheets)

    def format(self, value: float) -> str:
        return percent(value)


def shares_right(
    verifier: Verifier, images: Tensor, expected: Sequence[HasAttributes]
) -> dict[str, float]:
    """Return the shares in [0, 1] of the pictures in which the verifier reads what was expected.

    shape, colour, background and size: each alone. background_colour: background and colour both
    right. all_three: shape, colour and background right. all_four: size too.

    Args:
        verifier: reads the attributes of pictures.
        images: [B, 3, H, H] in [-1, 1], B at least 1.
        expected: the attributes of the B pictures. Raises ValueError if their number differs.
    """
    if len(images) != len(expected):
        raise ValueError(f"{len(images)} pictures, but attributes of {len(expected)}")
    counts: dict[str, int] = {}
    for reading, attributes in zip(verifier(images), expected, strict=True):
        for name, right in _agreement(reading, attributes).items():
            counts[name] = counts.get(name, 0) + right
    return {name: count / len(expected) for name, count in counts.items()}


def _agreement(seen: HasAttributes, expected: HasAttributes) -> dict[str, bool]:
    shape = seen.shape == expected.shape
    colour = seen.colour == expected.colour
    background = seen.background == expected.background
    size = seen.size == expected.size
    return {
        "shape": shape,
        "colour": colour,
        "background": background,
        "size": size,
        "background_colour": background and colour,
        "all_three": shape and colour and background,
        "all_four": shape and colour and background and size,
    }
