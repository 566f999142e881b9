"""The parts that a report is made of."""

from dataclasses import dataclass, field

from PIL import Image


@dataclass
class Table:
    """A table of text cells. heads: the column titles; the first column names the row."""

    heads: list[str]
    rows: list[list[str]]


@dataclass
class Picture:
    """A picture that is also written to NAME.png."""

    name: str
    image: Image.Image


@dataclass
class Section:
    """A title with the parts below it, in order; a string is a paragraph."""

    title: str
    parts: list[str | Table | Picture] = field(default_factory=list)
