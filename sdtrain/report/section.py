"""What a report is made of."""

from dataclasses import dataclass, field

from PIL import Image


@dataclass
class Table:
    """Cells of text. heads: of the columns; the first column says what a row is of."""

    heads: list[str]
    rows: list[list[str]]


@dataclass
class Picture:
    """A picture that is also written as NAME.png."""

    name: str
    image: Image.Image


@dataclass
class Section:
    """A title and, in order, what stands below it; a string is a paragraph."""

    title: str
    parts: list[str | Table | Picture] = field(default_factory=list)
