"""Read the captions of a folder of pictures from metadata.jsonl, metadata.csv or .txt files.

Errors name the file and the line.
"""

import csv
import io
import json
import os
import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sdtrain.data.caption_template import CaptionTemplate
from sdtrain.data.listing import CAPTION_SUFFIXES, Listing, shortened
from sdtrain.errors import DataError

METADATA = ("metadata.jsonl", "metadata.csv")
LAYOUTS = (
    "metadata.jsonl or metadata.csv in the top folder, with file_name and text, "
    "or a .txt file beside each picture"
)
SURROGATES = re.compile("[\ud800-\udfff]")
"""Unpaired halves of UTF-16 characters, which are not valid text."""

NumberedRow = tuple[int, dict[str, Any]]
"""(line number in the metadata file, {column: value})."""


class CaptionedPicture(NamedTuple):
    """A picture with what the folder's text files say about it.

    name: relative file name. captions: at least one; a single "" if the picture has none.
    label, weight: the values in the metadata file, or None. folder: the one that names its class
    if there are no labels; None for that of its name.
    """

    name: str
    captions: tuple[str, ...]
    label: Any = None
    weight: Any = None
    folder: str | None = None


@dataclass
class FolderCaptions:
    """All pictures of a folder with their captions.

    pictures: sorted by name. caption_files: relative names of the files that captions were read
    from. notes: lines for the user about missing and shared captions.
    """

    pictures: list[CaptionedPicture]
    caption_files: set[str]
    notes: list[str]


def read_captions(
    folder: str,
    listing: Listing,
    missing_captions: str,
    template: CaptionTemplate | None = None,
) -> FolderCaptions:
    """Read the captions of every picture in `listing` and of further ones that metadata name.

    Args:
        folder: of the pictures.
        listing: its files.
        missing_captions: "error" raises DataError if a picture has no caption, "empty" gives it "".
        template: makes the captions of the columns of the metadata; None if they are in one. The
            files of captions are not read for one without columns.
    """
    metadata = [name for name in METADATA if os.path.isfile(os.path.join(folder, name))]
    if len(metadata) == 2:
        raise DataError(
            "contains both metadata.jsonl and metadata.csv; only one of them can be used",
            key="data.path",
            value=folder,
            remedy="Remove one, or change data.path.",
        )
    if template is not None and not template.columns:
        caption = parse_captions(template({}), folder)
        pictures = [CaptionedPicture(name, caption) for name in listing.names]
        return FolderCaptions(pictures, set(), [])
    if metadata:
        source = metadata[0]
        pictures = _read_metadata(folder, source, listing, missing_captions, template)
        pictures += _pictures_without_row(folder, source, listing.names, pictures, missing_captions)
        pictures.sort(key=lambda picture: picture.name)
        uses = Counter([source])
    else:
        if template is not None:
            template.check((), f"data.path={folder}, without metadata.jsonl or metadata.csv,")
        source = "a .txt file beside each of them"
        pictures, uses = _read_text_files(folder, listing)
    empty = [picture.name for picture in pictures if picture.captions == ("",)]
    if empty and missing_captions == "error":
        raise _missing_captions_error(folder, source, empty, len(pictures))
    return FolderCaptions(pictures, set(uses), _notes(empty, len(pictures), uses))


def _read_text_files(folder: str, listing: Listing) -> tuple[list[CaptionedPicture], Counter[str]]:
    """Return the pictures with the captions beside them, and how many pictures use each file."""
    pictures = []
    uses: Counter[str] = Counter()
    for name in listing.names:
        file = caption_file(folder, name)
        lines = []
        if file is not None:
            lines = _read_text(folder, file, listing).splitlines()
            uses[file] += 1
        pictures.append(CaptionedPicture(name, _clean_captions(lines)))
    return pictures, uses


def _notes(empty: Sequence[str], count: int, uses: Counter[str]) -> list[str]:
    """Return lines about pictures without a caption and about files that several pictures share.

    empty: names of the pictures without a caption, out of `count`. uses: {caption file: number of
    pictures that use it}.
    """
    notes = []
    if empty:
        notes.append(
            f"{len(empty)} of {count} pictures have no caption and are given the empty one: "
            f"{shortened(empty)}."
        )
    shared = [file for file, pictures in uses.items() if pictures > 1]
    if shared:
        notes.append(
            f"{len(shared)} caption files belong to several pictures each: {shortened(shared)}."
        )
    return notes


def _pictures_without_row(
    folder: str,
    source: str,
    names: Sequence[str],
    with_row: Sequence[CaptionedPicture],
    missing_captions: str,
) -> list[CaptionedPicture]:
    """Return the pictures that have no metadata row, with empty captions.

    Raises DataError if there are any and missing_captions is "error".
    """
    named = {picture.name for picture in with_row}
    without = [name for name in names if name not in named]
    if without and missing_captions == "error":
        raise DataError(
            f"{len(without)} of {len(names)} pictures in data.path={folder} have no row in "
            f"{source}: {shortened(without)}",
            key="data.missing_captions",
            remedy="Add their rows, remove them, or set data.missing_captions=empty to train them "
            "with the empty caption.",
        )
    return [CaptionedPicture(name, ("",)) for name in without]


def _missing_captions_error(
    folder: str, source: str, empty: Sequence[str], count: int
) -> DataError:
    """Return the error for the pictures `empty`, out of `count`, that have no caption."""
    how_many = "none has a caption"
    if len(empty) < count:
        how_many = f"{len(empty)} of {count} have no caption"
    return DataError(
        f"Of the pictures in data.path={folder} {how_many}, first {empty[0]}; "
        f"captions were searched for in {source}. They must be in {LAYOUTS}",
        key="data.missing_captions",
        remedy="Write captions, change data.path, or set data.missing_captions=empty to train with "
        "the empty caption.",
    )


def _clean_caption(caption: str) -> str:
    # NUL ends a string in some tokenizers; the three layouts break the lines of the same caption
    # differently.
    return " ".join(caption.replace("\0", "").split())


def _clean_captions(captions: Sequence[str]) -> tuple[str, ...]:
    """Return the cleaned captions that are not empty, or a single "" if none is left."""
    cleaned = tuple(filter(None, map(_clean_caption, captions)))
    return cleaned or ("",)


def _read_text(folder: str, name: str, listing: Listing) -> str:
    """Read a caption or metadata file.

    Raises DataError if it is unreadable, not UTF-8, or a link that leaves the data set: the author
    of a data set must not be able to choose which other files of this machine are read.
    """
    path = os.path.join(folder, name)
    if os.path.islink(path) and not listing.contains(path):
        raise DataError(
            f"The caption file {path!r} is a link to a file outside the folder; such links are "
            "not read",
            key="data.path",
            remedy="Replace the link by the file itself, or change data.path.",
        )
    try:
        return Path(path).read_bytes().decode("utf-8-sig").replace("\0", "")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(
            f"The caption file {path!r} is not UTF-8: byte {error.start} is 0x{byte:02x}",
            key="data.path",
            remedy="Save the file as UTF-8, or change data.path.",
        ) from error
    except OSError as error:
        raise DataError(
            f"The caption file {path!r} cannot be read: {error.strerror}",
            key="data.path",
            remedy="Change its permissions, or data.path.",
        ) from error


def caption_file(folder: str, name: str) -> str | None:
    """Return the relative name of the text file beside a picture, or None if there is none."""
    for suffix in CAPTION_SUFFIXES:
        beside = os.path.splitext(name)[0] + suffix
        if os.path.isfile(os.path.join(folder, beside)):
            return beside
    return None


def _read_metadata(
    folder: str,
    source: str,
    listing: Listing,
    missing_captions: str,
    template: CaptionTemplate | None,
) -> list[CaptionedPicture]:
    """Return one picture for each row of the metadata file `source`.

    Raises DataError if a row does not name a picture inside the folder, or a caption is not text.
    """
    location = f"{source} of data.path={folder}"
    text = _read_text(folder, source, listing)
    parse = _parse_jsonl if source.endswith("jsonl") else _parse_csv
    numbered_rows = parse(text, location)
    columns = _columns(numbered_rows, location)
    column = None
    if template is None:
        column = _caption_column(columns, numbered_rows, location, missing_captions)
    else:
        template.check(sorted(columns), location)
    listed = set(listing.names)
    pictures = []
    missing = []
    for line, row in numbered_rows:
        line_location = f"{location}, line {line}"
        name = _relative_name(folder, row["file_name"], line_location, listing)
        value = row.get(column) if template is None else template(row)
        captions = parse_captions(value, line_location)
        if name not in listed and not os.path.isfile(os.path.join(folder, name)):
            missing.append(name)
        pictures.append(CaptionedPicture(name, captions, row.get("label"), row.get("weight")))
    if missing:
        raise DataError(
            f"{len(missing)} of {len(pictures)} rows of {location} name pictures that do not "
            f"exist: {shortened(missing)}. file_name is relative to the folder",
            key="data.path",
            remedy="Remove the rows, add the pictures, or change data.path.",
        )
    return pictures


def parse_captions(value: Any, location: str) -> tuple[str, ...]:
    """Return the captions in a metadata value: one string, or a list of several.

    Raises DataError if one of them is not text.
    """
    captions = []
    for caption in value if isinstance(value, list) else [value]:
        if not isinstance(caption, str | None) or SURROGATES.search(caption or ""):
            raise _line_error(f"{location}: the caption must be text, and is {caption!r}")
        captions.append(caption or "")
    return _clean_captions(captions)


def _columns(numbered_rows: Sequence[NumberedRow], location: str) -> set[str]:
    """Return the columns of all rows. Raises DataError for a row without file_name."""
    columns: set[str] = set()
    for line, row in numbered_rows:
        if "file_name" not in row:
            raise _missing_columns_error(location, line, row)
        columns.update(row)
    return columns


def _caption_column(
    columns: set[str],
    numbered_rows: Sequence[NumberedRow],
    location: str,
    missing_captions: str,
) -> str | None:
    """Return the column that holds the captions: "text", or else "caption".

    None if there is neither, but labels and missing_captions="empty". Otherwise a missing caption
    column raises DataError.
    """
    for column in ("text", "caption"):
        if column in columns:
            return column
    if missing_captions == "empty" and "label" in columns:
        return None
    line, row = numbered_rows[0] if numbered_rows else (1, {})
    raise _missing_columns_error(location, line, row)


def _missing_columns_error(location: str, line: int, row: dict[str, Any]) -> DataError:
    seen = ", ".join(map(str, row)) or "none"
    without_captions = (
        ", set data.missing_captions=empty" if {"file_name", "label"} <= row.keys() else ""
    )
    return DataError(
        f"{location} needs the columns file_name and text (or caption); line {line} has {seen}",
        key="data.path",
        remedy=f"Rename the columns{without_captions}, or change data.path.",
    )


def _line_error(problem: str) -> DataError:
    return DataError(problem, key="data.path", remedy="Correct it there, or change data.path.")


def _parse_jsonl(text: str, location: str) -> list[NumberedRow]:
    """Parse one JSON object a line. Raises DataError for a line that is not one."""
    numbered_rows = []
    # Not splitlines: JSON allows U+2028 inside a string.
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        # RecursionError: endlessly nested brackets. ValueError: also a number of thousands of
        # digits.
        except (ValueError, RecursionError) as error:
            problem = f"{location}, line {line}, is not JSON that can be read: {error}"
            raise _line_error(problem) from error
        if not isinstance(row, dict):
            raise _line_error(
                f"{location}, line {line}, must be an object with file_name and text, "
                f"and is {content[:60]}"
            )
        numbered_rows.append((line, row))
    return numbered_rows


def _parse_csv(text: str, location: str) -> list[NumberedRow]:
    """Parse CSV with a header line. Raises DataError for bad CSV or a line with too many fields."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    try:
        reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        numbered_rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        problem = f"{location}, line {reader.reader.line_num}, is not CSV: {error}"
        raise _line_error(problem) from error
    columns = len(reader.fieldnames)
    for line, row in numbered_rows:
        # DictReader keeps surplus fields under None: the end of a caption with an unquoted comma.
        if None in row:
            fields = columns + len(row[None])
            raise DataError(
                f"{location}, line {line}, has {fields} fields, but the header has {columns}",
                key="data.path",
                remedy="Put captions that contain commas in double quotes, or change data.path.",
            )
    return numbered_rows


def _relative_name(folder: str, file_name: Any, location: str, listing: Listing) -> str:
    """Return the file name in a metadata row, normalised and relative to the folder.

    Raises DataError if it leads outside the folder: a metadata file may come from a stranger.

    location: file and line, for the error.
    """
    is_name = isinstance(file_name, str) and file_name.isprintable()
    if not is_name or not 0 < len(file_name) < 4096:
        shown = ascii(file_name)[:60]
        raise _line_error(f"{location}: file_name must be the name of a picture, and is {shown}")
    name = posixpath.normpath(file_name)
    leads_up = name.split("/")[0] in ("..", "")
    if leads_up or not listing.contains(os.path.join(folder, file_name)):
        raise _line_error(
            f"{location}: file_name {file_name!r} leads outside the folder; "
            "it must be a relative path inside it"
        )
    return name
