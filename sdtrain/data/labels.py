"""The class of each picture in a folder: what its metadata say, else the subfolder it lies in."""

import os
import posixpath
from collections.abc import Sequence
from typing import Any

from sdtrain.data.captions import Described
from sdtrain.types import Classes

LAYOUT = "a subfolder for each class, or a column label in metadata.jsonl or metadata.csv"


def labels_of(rows: Sequence[Described]) -> tuple[list[int], Classes]:
    """The label of each row, 0 where there are no classes, and what the classes are.

    Data that are trained without labels need none, so nothing here is an error: `why_none` says
    what is in the way.
    """
    if any(row.label is not None for row in rows):
        return _of_column(rows)
    return _of_folders(rows)


def _of_column(rows: Sequence[Described]) -> tuple[list[int], Classes]:
    values = [_number(row.label) for row in rows]
    for row, value in zip(rows, values, strict=True):
        if value is None or isinstance(value, bool) or not isinstance(value, int | str):
            return _none(rows, f"the label of {row.name} is {row.label!r}, no number and no name")
    if all(isinstance(value, int) for value in values):
        count = max(values) + 1
        distinct = set(values)
        # As many as the largest says. Not range(count): a label may be any number.
        if min(distinct) != 0 or len(distinct) != count:
            seen = ", ".join(map(str, sorted(distinct)[:5]))
            return _none(rows, f"the numbers in label must be 0, 1, 2 and so on, and are {seen}")
        if count == 1:
            return _none(rows, "all labels are 0")
        return values, Classes(count)
    if not all(isinstance(value, str) for value in values):
        return _none(rows, "the column label holds numbers and names")
    return _named(values, "the column label")


def _of_folders(rows: Sequence[Described]) -> tuple[list[int], Classes]:
    folders = [posixpath.dirname(row.name) for row in rows]
    if not any(folders):
        return _none(rows, "all pictures lie beside each other")
    # What all of them lie in is no class.
    common = os.path.commonpath(folders) if all(folders) else ""
    below = [posixpath.relpath(folder or ".", common or ".") for folder in folders]
    values = [folder.split("/")[0] for folder in below]
    outside = [row.name for row, value in zip(rows, values, strict=True) if value == "."]
    if outside:
        return _none(rows, f"{outside[0]} lies in no subfolder, or in the only one")
    return _named(values, "the subfolders")


def _named(values: list[str], source: str) -> tuple[list[int], Classes]:
    names = sorted(set(values))
    if all(name.isdecimal() for name in names):
        names.sort(key=int)
    place = {name: label for label, name in enumerate(names)}
    if len(names) < 2:
        return [0] * len(values), Classes(why_none=f"{source} name one class alone, {names[0]!r}")
    return [place[value] for value in values], Classes(len(names), tuple(names))


def _none(rows: Sequence[Described], why: str) -> tuple[list[int], Classes]:
    return [0] * len(rows), Classes(why_none=why)


def _number(value: Any) -> Any:
    """A number for its digits: CSV has no other way to write one."""
    if isinstance(value, str):
        value = value.strip()
        if value.isascii() and value.isdecimal() and len(value) < 9:
            return int(value)
        return value or None
    return value
