"""Measure whether the network looks for a word where it draws what the word means."""

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from sdtrain.data.shapes import (
    COLOURS,
    RADII,
    SHAPES,
    Attributes,
    Shapes,
    canonical_caption,
    coverage,
    evaluation_prompts,
)
from sdtrain.errors import UserError
from sdtrain.evaluation.metric import CAPTIONS, Measurement, Metric
from sdtrain.evaluation.subject import Subject
from sdtrain.evaluation.verifier import Verifier
from sdtrain.generation.attention_maps import (
    WordMap,
    attention_sheet,
    check_attention,
    draw_with_attention,
)
from sdtrain.generation.drawing import Request

SHEET_PICTURES = 8


class AttentionLocation(Metric):
    """Area under the ROC curve of the map of a word, as a detector of the drawn shape's pixels.

    One row for the word of the shape and one for that of its colour; for that of the background
    colour the pixels beside the shape are to be detected. 0.5 is chance; a second column compares
    the maps with the shapes of the next pictures, which exceeds chance where shapes tend to lie in
    the middle. The combinations are trained ones, with the standard caption. It recognises flat
    shapes, so the run must use data=shapes; a picture without a shape counts as 0.5.
    """

    needs = frozenset({CAPTIONS})
    gives = frozenset({"caption"})
    unit = "area under the ROC curve"
    higher_is_better = True

    def __init__(self) -> None:
        self.verifier = Verifier(shapes=SHAPES, palette=COLOURS, radii=RADII, coverage=coverage)

    def check(self, subject: Subject) -> None:
        if not issubclass(subject.data_source.data_class, Shapes):
            raise UserError(
                "recognises flat shapes only: it needs a run with data=shapes",
                key="metrics",
                value="attention_location",
                remedy="Choose another metric.",
            )
        check_attention(subject.model, "metrics", "attention_location")

    def measure(self, subject: Subject) -> Measurement:
        expected = [attributes for _, attributes in self._pairs(subject)]
        requests = []
        for number, attributes in enumerate(expected):
            requests.append(Request(subject.seed + number, prompt=canonical_caption(attributes)))
        images, maps = draw_with_attention(
            subject.model, requests, subject.drawing, subject.image_size
        )
        masks = [torch.from_numpy(self.verifier.covered(image) > 0.5) for image in images]
        columns = {
            "measured": mean_areas(maps, expected, masks),
            "other_picture": mean_areas(maps, expected, masks[1:] + masks[:1]),
        }
        return Measurement(
            columns, {"": attention_sheet(images[:SHEET_PICTURES], maps[:SHEET_PICTURES])}
        )

    def _pairs(self, subject: Subject) -> list[tuple[str, Attributes]]:
        return evaluation_prompts(subject.num_images, False, subject.seed)

    def format(self, value: float) -> str:
        return f"{value:.3f}"


def mean_areas(
    maps: list[list[WordMap]], attributes: list[Attributes], masks: list[Tensor]
) -> dict[str, float]:
    """Return the mean area under the ROC curve for the words of shape, colour and background.

    maps, attributes: of each picture, whose prompt is the standard caption. masks: bool [H, W], the
    pixels of the shape; one that is empty or full counts as 0.5.
    """
    areas: dict[str, list[float]] = {"shape": [], "colour": [], "background": []}
    for words, wanted, mask in zip(maps, attributes, masks, strict=True):
        # The words of the standard caption: "a large red star on a blue background".
        colour, shape = words[2], words[3]
        background = words[-2]
        assert (colour.word, shape.word) == (wanted.colour, wanted.shape)
        areas["shape"].append(_area(shape, mask))
        areas["colour"].append(_area(colour, mask))
        areas["background"].append(_area(background, ~mask))
    return {name: float(np.mean(values)) for name, values in areas.items()}


def _area(word: WordMap, mask: Tensor) -> float:
    if not mask.any() or mask.all():
        return 0.5
    return binary_auroc(word.attention.flatten(), mask.flatten().int()).item()
