"""Does a picture show what its prompt asked for?"""

from collections.abc import Sequence

from torch import Tensor

from sdtrain import pictures
from sdtrain.data.shapes import COLOURS, RADII, SHAPES, Shapes, coverage, evaluation_prompts
from sdtrain.errors import UserError
from sdtrain.evaluation.metric import CAPTIONS, Measurement, Metric, percent
from sdtrain.evaluation.subject import Subject
from sdtrain.evaluation.verifier import Described, Verifier
from sdtrain.generation.drawing import Request

SHOWN = 64  # pictures of a grid

SPLITS = {"trained": False, "held_out": True}
"""Column -> whether its combinations of shape and colours were held out of training."""


class PromptAccuracy(Metric):
    """Share of pictures in which a verifier reads what the prompt asked for.

    Combinations of shape and colours that were trained stand beside those that were held out of
    training. The verifier reads flat shapes, so the run must be one of data=shapes.
    """

    needs = frozenset({CAPTIONS})
    gives = frozenset({"caption"})
    unit = "share of the pictures"
    higher_is_better = True

    def __init__(self) -> None:
        self.verifier = Verifier(shapes=SHAPES, palette=COLOURS, radii=RADII, coverage=coverage)

    def check(self, subject: Subject) -> None:
        if not issubclass(subject.source.kind, Shapes):
            raise UserError(
                "reads flat shapes: it needs a run with data=shapes",
                key="metrics",
                value="prompt_accuracy",
                remedy="Choose metrics=retrieval for pictures.",
            )

    def measure(self, subject: Subject) -> Measurement:
        columns = {}
        sheets = {}
        for name, held_out in SPLITS.items():
            asked = evaluation_prompts(subject.num_images, held_out, subject.seed)
            prompts = [prompt for prompt, _ in asked]
            requests = [
                Request(subject.seed + place, prompt=prompt) for place, prompt in enumerate(prompts)
            ]
            images = subject.draw(requests)
            columns[name] = shares_right(self.verifier, images, [what for _, what in asked])
            sheets[name] = pictures.grid(images[:SHOWN], prompts[:SHOWN], columns=8)
        return Measurement(columns, sheets)

    def format(self, value: float) -> str:
        return percent(value)


def shares_right(
    verifier: Verifier, images: Tensor, expected: Sequence[Described]
) -> dict[str, float]:
    """Shares in [0, 1] of the pictures in which the verifier reads what was expected.

    shape, colour, background and size: each alone. background_colour: background and colour both
    right. all_three: shape, colour and background together. all_four: size too.

    Args:
        images: [B, 3, H, H] in [-1, 1], B at least 1.
        expected: B descriptions. Raises ValueError where the numbers differ.
    """
    if len(images) != len(expected):
        raise ValueError(f"{len(images)} pictures, but {len(expected)} descriptions")
    counts: dict[str, int] = {}
    for seen, asked in zip(verifier(images), expected, strict=True):
        for name, right in _agreement(seen, asked).items():
            counts[name] = counts.get(name, 0) + right
    return {name: count / len(expected) for name, count in counts.items()}


def _agreement(seen: Described, asked: Described) -> dict[str, bool]:
    shape = seen.shape == asked.shape
    colour = seen.colour == asked.colour
    background = seen.background == asked.background
    size = seen.size == asked.size
    return {
        "shape": shape,
        "colour": colour,
        "background": background,
        "size": size,
        "background_colour": background and colour,
        "all_three": shape and colour and background,
        "all_four": shape and colour and background and size,
    }
