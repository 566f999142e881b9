"""Label each picture of a folder with the class in its metadata, or else with its subfolder."""

import os
import posixpath
from collections.abc import Sequence
from typing import Any

from sdtrain.data.captions import CaptionedPicture
from sdtrain.data.listing import shortened
from sdtrain.types import Classes

LAYOUT = "a subfolder for each class, or a column label in metadata.jsonl or metadata.csv"


def labels_of(pictures: Sequence[CaptionedPicture]) -> tuple[list[int], Classes]:
    """Return the label of each picture, 0 if there are no classes, and what the classes are.

    Never raises, because training without labels needs no classes: `Classes.why_none` says why
    there are none.
    """
    if any(picture.label is not None for picture in pictures):
        return _from_metadata(pictures)
    return _from_folders(pictures)


def _from_metadata(pictures: Sequence[CaptionedPicture]) -> tuple[list[int], Classes]:
    """Take labels 0, 1, 2, ... as they are, and number classes that have names."""
    missing = [picture.name for picture in pictures if picture.label in (None, "")]
    if missing:
        reason = f"{len(missing)} of {len(pictures)} pictures have no label: {shortened(missing)}"
        return _no_classes(pictures, reason)
    values = []
    kinds = set()
    for picture in pictures:
        value = _parse_number(picture.label)
        if value is None or isinstance(value, bool) or not isinstance(value, int | str):
            reason = (
                f"the label of {picture.name} is {picture.label!r}, neither a number nor a name"
            )
            return _no_classes(pictures, reason)
        values.append(value)
        kinds.add(type(value))
    if len(kinds) > 1:
        return _no_classes(pictures, "the column label mixes numbers and names")
    if kinds == {int}:
        count = max(values) + 1
        distinct = set(values)
        # Counted instead of compared with range(count), because a label may be any huge number.
        if min(distinct) != 0 or len(distinct) != count:
            seen = ", ".join(map(str, sorted(distinct)[:5]))
            reason = f"the numbers in label must be 0, 1, 2 and so on, and are {seen}"
            return _no_classes(pictures, reason)
        if count == 1:
            return _no_classes(pictures, "all labels are 0")
        return values, Classes(count)
    return _number_names(values, "the column label")


def _from_folders(pictures: Sequence[CaptionedPicture]) -> tuple[list[int], Classes]:
    """Number the subfolders of the deepest folder that contains all pictures."""
    folders = [_folder_of(picture) for picture in pictures]
    if not any(folders):
        return _no_classes(pictures, "no picture has a label, and none lies in a subfolder")
    # A folder that contains all pictures is not a class.
    common = os.path.commonpath(folders) if all(folders) else ""
    # Once for each folder: a million pictures would take 15 seconds.
    below = {folder: posixpath.relpath(folder or ".", common or ".") for folder in set(folders)}
    names = []
    for picture, folder in zip(pictures, folders, strict=True):
        if below[folder] == ".":
            reason = f"{picture.name} lies in no subfolder, or in the only one"
            return _no_classes(pictures, reason)
        names.append(below[folder].split("/")[0])
    return _number_names(names, "the subfolders")


def _folder_of(picture: CaptionedPicture) -> str:
    return posixpath.dirname(picture.name) if picture.folder is None else picture.folder


def _number_names(values: list[str], source: str) -> tuple[list[int], Classes]:
    """Number class names in sorted order, numerically if all of them are numbers."""
    names = sorted(set(values))
    if all(map(str.isdecimal, names)):
        names.sort(key=int)
    label_of_name = dict(zip(names, range(len(names)), strict=True))
    if len(names) < 2:
        return [0] * len(values), Classes(why_none=f"{source} name only one class, {names[0]!r}")
    return [label_of_name[value] for value in values], Classes(len(names), tuple(names))


def _no_classes(pictures: Sequence[CaptionedPicture], why: str) -> tuple[list[int], Classes]:
    return [0] * len(pictures), Classes(why_none=why)


def _parse_number(value: Any) -> Any:
    """Turn a string of digits into an int: CSV has no other way to write a number."""
    if isinstance(value, str):
        value = value.strip()
        if value.isascii() and value.isdecimal() and len(value) < 9:
            return int(value)
        return value or None
    return value
