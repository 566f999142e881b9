"""Pictures drawn by code, without files: one flat shape on a flat background.

Each has a caption, a label and an exact depth map, and is a pure function of (seed, split, index).
A tenth of the (shape, colour, background) triples is never trained on, so that one can measure
whether a model generalises to new combinations of known words.
"""

import hashlib
import math
import re
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from sdtrain.errors import UserError
from sdtrain.randomness import KeyedRandom
from sdtrain.types import Row

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (215, 30, 45),
    "green": (30, 150, 70),
    "blue": (35, 85, 215),
    "yellow": (250, 215, 50),
    "purple": (135, 50, 165),
    "orange": (250, 130, 25),
    "white": (250, 250, 250),
    "black": (20, 20, 25),
}
"""Name -> RGB in [0, 255]. Any two are at least 89 apart (Euclidean): orange and yellow."""

SIZES = ("large", "small")
RADII = {"large": (0.32, 0.35), "small": (0.19, 0.22)}
"""Size -> (lowest, highest) radius as a fraction of the picture's side.

The radius is half the side of the shape's bounding box.
"""

NUM_CLASSES = len(SHAPES) * len(COLOURS)
HELD_OUT_SHARE = 0.1
SPLITS = ("train", "validation", "held_out")

_MARGIN = 2.0
"""Pixels around a shape's box. The sharpest antialiased tip, of the star, exceeds it by 1.3."""

_SYNONYMS = {
    "large": ("large", "big", "huge"),
    "small": ("small", "little", "tiny"),
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "star": ("star", "five-pointed star"),
    "cross": ("cross", "plus sign"),
    "ring": ("ring", "hoop"),
    "red": ("red", "scarlet"),
    "purple": ("purple", "violet"),
}
_TEMPLATES = (
    "a {size} {colour} {shape} on a {background} background",
    "{background} background with a {size} {colour} {shape}",
    "on {background}, a {size} {colour} {shape}",
    "a {colour} {shape}, {size}, on {background}",
    "the {shape} is {colour} and {size}, the background is {background}",
    "a picture of a {size} {colour} {shape} in front of a {background} background",
    "{size} {colour} {shape}, {background} background",
    "a {background} picture with a {size} {shape} in {colour}",
    "one {size} {shape} in {colour} against {background}",
    "there is a {size} {colour} {shape} on the {background} background",
    "a {shape} that is {size} and {colour}, on a {background} backdrop",
    "{colour} {shape} on {background}, {size}",
    "against a {background} backdrop, a {size} {colour} {shape}",
    "a {size} {shape}, {colour} on {background}",
)


@dataclass(frozen=True)
class Attributes:
    """What a picture shows. The fields are words of SHAPES, COLOURS, SIZES and COLOURS."""

    shape: str
    colour: str
    size: str
    background: str


def is_held_out(shape: str, colour: str, background: str) -> bool:
    """Return whether the triple is never trained on.

    The answer is the same for every seed, so that models of different seeds can be compared.
    """
    triple = f"{shape}/{colour}/{background}".encode()
    digest = hashlib.blake2b(triple, key=b"sdtrain shapes held out", digest_size=8).digest()
    return int.from_bytes(digest, "little") < HELD_OUT_SHARE * 2**64


def _triples() -> dict[bool, list[tuple[str, str, str]]]:
    """Return {whether held out: the (shape, colour, background) triples}."""
    triples = {False: [], True: []}
    for shape, colour, background in product(SHAPES, COLOURS, COLOURS):
        if colour != background:
            held_out = is_held_out(shape, colour, background)
            triples[held_out].append((shape, colour, background))
    return triples


_TRIPLES = _triples()


def label_of(attributes: Attributes) -> int:
    """Return the class in [0, NUM_CLASSES): each pair of shape and colour is one."""
    return SHAPES.index(attributes.shape) * len(COLOURS) + list(COLOURS).index(attributes.colour)


def canonical_caption(attributes: Attributes) -> str:
    """Return the standard caption, as in "a large red star on a blue background"."""
    return _fill(
        _TEMPLATES[0], attributes.size, attributes.colour, attributes.shape, attributes.background
    )


def coverage(
    shape: str,
    x: float | np.ndarray,
    y: float | np.ndarray,
    radius: float | np.ndarray,
    image_size: int,
) -> np.ndarray:
    """Return how much of each pixel the shape covers, float32 [..., H, W] in [0, 1].

    (x, y) is the centre of the shape's bounding box and radius half its side, in pixels: numbers,
    or arrays of one shape [...]. The origin is the top left corner of the picture, y points down.
    Parts outside the picture are cut off.
    """
    x = np.asarray(x, dtype=np.float32)[..., None]
    y = np.asarray(y, dtype=np.float32)[..., None]
    radius = np.asarray(radius, dtype=np.float32)[..., None]
    grid = np.arange(image_size, dtype=np.float32) + np.float32(0.5)
    u = ((grid - x) / radius)[..., None, :]
    v = ((grid - y) / radius)[..., :, None]
    return np.clip(0.5 - radius[..., None] * _DISTANCES[shape](u, v), 0.0, 1.0)


def _circle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return the signed distance to the outline of a shape in [-1, 1]^2, negative inside.

    The functions below do the same for their shapes. Outside a corner they give the distance to the
    line of the nearer edge, which is precise enough for antialiasing.
    """
    return np.sqrt(u * u + v * v) - 1.0


def _square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # Does not fill the box: with half side 1 a square would look larger than the other shapes.
    return np.maximum(np.abs(u), np.abs(v)) - 0.88


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # Equilateral with side 2, height sqrt(3), the centre of its box at the origin.
    half_height = math.sqrt(3) / 2
    return np.maximum(v - half_height, half_height * np.abs(u) - 0.5 * v - half_height / 2)


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # Five points of circumradius 1.05, which makes the box 2 wide; notches at 0.47 of that, so that
    # small stars stay plump.
    outer = 1.05
    notch = 0.47 * 1.05
    sector = math.pi / 5
    v = v - outer * (1 - math.cos(sector)) / 2
    distance = np.sqrt(u * u + v * v)
    angle = np.arctan2(u, -v)
    # All ten edges are mirror images: fold the angle onto the one from (0, outer) to the notch at
    # 36 degrees.
    folded = np.abs(angle - 2 * sector * np.round(angle / (2 * sector)))
    across = notch * math.sin(sector)
    along = outer - notch * math.cos(sector)
    edge = math.hypot(across, along)
    return (
        distance * (along / edge * np.sin(folded) + across / edge * np.cos(folded))
        - outer * across / edge
    )


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u = np.abs(u)
    v = np.abs(v)
    return np.maximum(np.maximum(u, v) - 1.0, np.minimum(u, v) - 0.33)


def _ring(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.abs(np.sqrt(u * u + v * v) - 0.75) - 0.25


_DISTANCES = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
}
_RGB = {
    name: np.array(rgb, dtype=np.float32)[:, None, None] / 127.5 - 1.0
    for name, rgb in COLOURS.items()
}


class ShapePictures:
    """One split of `Shapes`.

    The ordinal of an item is ignored, because there is no random crop or flip.
    """

    def __init__(self, *, split: str, seed: int, length: int, image_size: int) -> None:
        self.image_size = image_size
        self._length = length
        self._triples = _TRIPLES[split == "held_out"]
        self._random = KeyedRandom(seed, f"data.shapes.{split}")

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, item: tuple[int, int]) -> Row:
        """Return the row of (index, ordinal), with a depth map. IndexError outside the split.

        All shapes are taken to have the same physical size, so the visible radius gives their
        distance: inverse depth is radius / largest radius on the shape and 0 on the background.
        """
        attributes, x, y, radius, caption = self._scene(item[0])
        covered = coverage(attributes.shape, x, y, radius, self.image_size)
        background = _RGB[attributes.background]
        colour = _RGB[attributes.colour]
        # Depth is not antialiased: a half covered pixel has no depth between shape and background.
        depth = (covered > 0.5) * np.float32(radius / (RADII["large"][1] * self.image_size))
        return Row(
            image=torch.from_numpy(background + covered * (colour - background)),
            caption=caption,
            label=label_of(attributes),
            depth=torch.from_numpy(depth)[None],
        )

    def attributes(self, index: int) -> Attributes:
        """Return the attributes of picture `index`, without drawing it."""
        return self._scene(index)[0]

    def caption(self, index: int) -> str:
        """Return the caption of picture `index`, without drawing it."""
        return self._scene(index)[4]

    def _scene(self, index: int) -> tuple[Attributes, float, float, float, str]:
        """Return (attributes, x, y, radius, caption); lengths in pixels."""
        if not 0 <= index < self._length:
            raise IndexError(f"index {index} is outside a split of {self._length} pictures")
        draw = self._random.at(index)
        attributes = _draw_attributes(draw, self._triples)
        low, high = RADII[attributes.size]
        radius = draw.uniform(low, high) * self.image_size
        reach = radius + _MARGIN
        x, y = draw.uniform(reach, self.image_size - reach, size=2)
        return attributes, x, y, radius, _draw_caption(draw, attributes)


class Shapes:
    """Flat shapes on flat backgrounds, at random places.

    6 shapes x 8 colours x 7 other background colours x 2 sizes. Raises UserError for a number
    below its minimum.

    Args:
        seed: which pictures are drawn.
        size: number of training pictures.
        validation_size: number of pictures in each of the splits "validation" (new pictures of
            trained triples) and "held_out" (triples never trained on, the same for every seed).
        image_size: side in pixels, at least 16.
    """

    num_classes = NUM_CLASSES

    def __init__(
        self, *, seed: int = 0, size: int = 60000, validation_size: int = 1024, image_size: int = 32
    ) -> None:
        for name, value, minimum in (
            ("size", size, 1),
            ("validation_size", validation_size, 1),
            ("image_size", image_size, 16),
        ):
            if value < minimum:
                problem = f"is too small: it must be at least {minimum}"
                raise UserError(problem, key=f"data.{name}", value=value)
        self.seed = seed
        self.size = size
        self.validation_size = validation_size
        self.image_size = image_size

    def split(self, name: str) -> ShapePictures:
        """Return the split "train", "validation" or "held_out". ValueError for any other name."""
        if name not in SPLITS:
            raise ValueError(f"no split {name!r}: the shapes have {', '.join(SPLITS)}")
        length = self.size if name == "train" else self.validation_size
        return ShapePictures(split=name, seed=self.seed, length=length, image_size=self.image_size)

    def example_prompts(self, count: int) -> list[str]:
        """Return `count` canonical captions of trained triples, taking the shapes in turn.

        A longer list starts with the shorter one.
        """
        colours = list(COLOURS)
        prompts = []
        i = 0
        while len(prompts) < count:
            # 24 steps visit half of the (shape, colour) pairs; i // 24 shifts the colours to the
            # other half.
            shape = i % len(SHAPES)
            colour = (i + i // 24) % len(colours)
            background = (colour + 1 + 3 * i % (len(colours) - 1)) % len(colours)
            attributes = Attributes(
                SHAPES[shape], colours[colour], SIZES[i // len(SHAPES) % 2], colours[background]
            )
            if not is_held_out(attributes.shape, attributes.colour, attributes.background):
                prompts.append(canonical_caption(attributes))
            i += 1
        return prompts


def evaluation_prompts(count: int, held_out: bool, seed: int) -> list[tuple[str, Attributes]]:
    """Return `count` (caption, attributes) pairs, drawn like those of the data set.

    held_out: whether from held-out or from trained triples. A pure function of its arguments; a
    longer list starts with the shorter one.
    """
    random = KeyedRandom(seed, f"shapes.evaluation.{'held_out' if held_out else 'trained'}")
    prompts = []
    for i in range(count):
        draw = random.at(i)
        attributes = _draw_attributes(draw, _TRIPLES[held_out])
        prompts.append((_draw_caption(draw, attributes), attributes))
    return prompts


def _draw_attributes(draw: np.random.Generator, triples: list[tuple[str, str, str]]) -> Attributes:
    shape, colour, background = triples[draw.integers(len(triples))]
    return Attributes(shape, colour, SIZES[draw.integers(len(SIZES))], background)


def _draw_caption(draw: np.random.Generator, attributes: Attributes) -> str:
    template = _TEMPLATES[draw.integers(len(_TEMPLATES))]
    words = []
    for word in (attributes.size, attributes.colour, attributes.shape, attributes.background):
        synonyms = _SYNONYMS.get(word, (word,))
        words.append(synonyms[draw.integers(len(synonyms))])
    return _fill(template, *words)


def _fill(template: str, size: str, colour: str, shape: str, background: str) -> str:
    text = template.format(size=size, colour=colour, shape=shape, background=background)
    # Of all words here only "orange" takes "an"; none begins with a vowel that sounds like a
    # consonant.
    return re.sub(r"\ba (?=[aeiou])", "an ", text)
