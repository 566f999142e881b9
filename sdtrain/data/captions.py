"""The captions of a folder of pictures: metadata.jsonl, metadata.csv, or a .txt beside each.

An error names file and line.
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

from sdtrain.data.listing import CAPTION_SUFFIXES, Listing, some
from sdtrain.errors import DataError

METADATA = ("metadata.jsonl", "metadata.csv")
LAYOUTS = (
    "metadata.jsonl or metadata.csv at its top with file_name and text, "
    "or a .txt beside each picture"
)
SURROGATES = re.compile("[\ud800-\udfff]")
"""Halves of a character, which are no text."""

NumberedRow = tuple[int, dict[str, Any]]
"""(line of the file, what it holds by column)."""


class Described(NamedTuple):
    """A picture as its folder describes it.

    captions: at least one; "" alone where there is none. label: what its metadata say, or None.
    """

    name: str
    captions: tuple[str, ...]
    label: Any = None


@dataclass
class Captioned:
    """The pictures of a folder with their captions.

    rows: sorted by name. sources: the files that the captions were read
    from, by relative name. notes: lines about what they hold.
    """

    rows: list[Described]
    sources: set[str]
    notes: list[str]


def read_captions(folder: str, listing: Listing, missing_captions: str) -> Captioned:
    """Of every picture of the listing, and of what else a metadata file names.

    missing_captions: "error" raises DataError for a picture without one, "empty" takes "".
    """
    names = listing.names
    metadata = [name for name in METADATA if os.path.isfile(os.path.join(folder, name))]
    if len(metadata) == 2:
        raise DataError(
            "holds both metadata.jsonl and metadata.csv; only one can be meant",
            key="data.path",
            value=folder,
            remedy="Remove one, or change data.path.",
        )
    if metadata:
        source = metadata[0]
        rows = _from_metadata(folder, source, listing, missing_captions)
        rows += _without_row(folder, source, names, rows, missing_captions)
        rows.sort(key=lambda row: row.name)
        sources = Counter([source])
    else:
        source = "a .txt file beside them"
        beside = [_file_beside(folder, name) for name in names]
        rows = []
        for name, file in zip(names, beside, strict=True):
            lines = _text(folder, file, listing).splitlines() if file else []
            rows.append(Described(name, _cleaned(lines)))
        sources = Counter(file for file in beside if file)
    empty = [row.name for row in rows if row.captions == ("",)]
    if empty and missing_captions == "error":
        raise _empty_captions(folder, source, empty, len(rows))
    return Captioned(rows, set(sources), _notes(empty, len(rows), sources))


def _notes(empty: Sequence[str], count: int, sources: Counter[str]) -> list[str]:
    """Lines about pictures without a caption, `empty` of `count`, and those with another's."""
    notes = []
    if empty:
        notes.append(
            f"{len(empty)} of {count} pictures have no caption, and get the empty one: "
            f"{some(empty)}."
        )
    shared = [file for file, pictures in sources.items() if pictures > 1]
    if shared:
        notes.append(f"{len(shared)} captions belong to several pictures each: {some(shared)}.")
    return notes


def _without_row(
    folder: str,
    source: str,
    names: Sequence[str],
    rows: Sequence[Described],
    missing_captions: str,
) -> list[Described]:
    """The pictures that no row names; DataError where they need a caption."""
    listed = {row.name for row in rows}
    without = [name for name in names if name not in listed]
    if without and missing_captions == "error":
        raise DataError(
            f"{len(without)} of {len(names)} pictures in data.path={folder} have no row in "
            f"{source}: {some(without)}",
            key="data.missing_captions",
            remedy="Add their rows, remove them, or set data.missing_captions=empty to train them "
            "with the empty caption.",
        )
    return [Described(name, ("",)) for name in without]


def _empty_captions(folder: str, source: str, empty: Sequence[str], count: int) -> DataError:
    """The error for pictures without a caption, `empty` of `count`."""
    how_many = "none has a caption"
    if len(empty) < count:
        how_many = f"{len(empty)} of {count} have none"
    return DataError(
        f"Of the pictures in data.path={folder} {how_many}, first {empty[0]}; "
        f"captions were looked for in {source}. They must be in {LAYOUTS}",
        key="data.missing_captions",
        remedy="Write them, change data.path, or set data.missing_captions=empty to train with the "
        "empty caption.",
    )


def _clean(caption: str) -> str:
    # NUL ends a string in some tokenizers; line breaks differ between the three layouts for the
    # same caption.
    return " ".join(caption.replace("\0", "").split())


def _cleaned(captions: Sequence[str]) -> tuple[str, ...]:
    """Those that are not empty; "" where all are."""
    cleaned = map(_clean, captions)
    return tuple(caption for caption in cleaned if caption) or ("",)


def _text(folder: str, name: str, listing: Listing) -> str:
    """A file of captions. DataError where it is a link to what is no part of the data: whoever
    made the data must not choose which of this machine's files are read.
    """
    path = os.path.join(folder, name)
    if os.path.islink(path) and not listing.holds(path):
        raise DataError(
            f"The captions in {path!r} are a link to a file outside the folder, which is not read",
            key="data.path",
            remedy="Put the file itself there, or change data.path.",
        )
    try:
        return Path(path).read_bytes().decode("utf-8-sig").replace("\0", "")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(
            f"The captions in {path!r} are not UTF-8: byte {error.start} is 0x{byte:02x}",
            key="data.path",
            remedy="Write the file anew as UTF-8, or change data.path.",
        ) from error
    except OSError as error:
        raise DataError(
            f"The captions in {path!r} cannot be read: {error.strerror}",
            key="data.path",
            remedy="Change its permissions, or data.path.",
        ) from error


def _file_beside(folder: str, name: str) -> str | None:
    """The relative name of the file with a picture's caption."""
    for suffix in CAPTION_SUFFIXES:
        beside = os.path.splitext(name)[0] + suffix
        if os.path.isfile(os.path.join(folder, beside)):
            return beside
    return None


def _from_metadata(
    folder: str, source: str, listing: Listing, missing_captions: str
) -> list[Described]:
    """What each row of the metadata file says.

    Raises DataError for a row that names no picture inside the folder, and for what is no text.
    """
    where = f"{source} of data.path={folder}"
    text = _text(folder, source, listing)
    numbered = _jsonl(text, where) if source.endswith("jsonl") else _csv(text, where)
    column = _caption_column(numbered, where, missing_captions)
    known = set(listing.names)
    rows = []
    missing = []
    for line, row in numbered:
        line_of_file = f"{where}, line {line}"
        name = _inside(folder, row["file_name"], line_of_file, listing)
        captions = _captions_in(row.get(column), line_of_file)
        if name not in known and not os.path.isfile(os.path.join(folder, name)):
            missing.append(name)
        rows.append(Described(name, captions, row.get("label")))
    if missing:
        raise DataError(
            f"{len(missing)} of {len(rows)} rows of {where} name pictures that are not there: "
            f"{some(missing)}. file_name is relative to the folder",
            key="data.path",
            remedy="Remove the rows, add the pictures, or change data.path.",
        )
    return rows


def _captions_in(value: Any, where: str) -> tuple[str, ...]:
    """A caption, or a list of several for one picture."""
    captions = value if isinstance(value, list) else [value]
    for caption in captions:
        if not isinstance(caption, str | None) or SURROGATES.search(caption or ""):
            raise _bad_line(f"{where}: the caption must be text, and is {caption!r}")
    return _cleaned([caption or "" for caption in captions])


def _caption_column(
    numbered: Sequence[NumberedRow], where: str, missing_captions: str
) -> str | None:
    """The column of the captions: text, else caption; None where there are labels in their place,
    and captions may be missing.

    Raises DataError where it or file_name is missing.
    """
    for line, row in numbered:
        if "file_name" not in row:
            raise _missing_columns(where, line, row)
    for column in ("text", "caption"):
        if any(column in row for _, row in numbered):
            return column
    if missing_captions == "empty" and any("label" in row for _, row in numbered):
        return None
    raise _missing_columns(where, *(numbered[0] if numbered else (1, {})))


def _missing_columns(where: str, line: int, row: dict[str, Any]) -> DataError:
    seen = ", ".join(map(str, row)) or "none"
    return DataError(
        f"{where} needs the columns file_name and text (or caption); line {line} has {seen}",
        key="data.path",
        remedy="Rename the columns, or change data.path.",
    )


def _bad_line(problem: str) -> DataError:
    return DataError(problem, key="data.path", remedy="Correct the line, or change data.path.")


def _jsonl(text: str, where: str) -> list[NumberedRow]:
    numbered = []
    # Not splitlines: JSON allows U+2028 inside a string.
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        # RecursionError and ValueError: brackets without end, a number of thousands of digits.
        except (ValueError, RecursionError) as error:
            problem = f"{where}, line {line}, is not JSON that can be read: {error}"
            raise _bad_line(problem) from error
        if not isinstance(row, dict):
            raise _bad_line(
                f"{where}, line {line}, must be an object with file_name and text, "
                f"and is {content[:60]}"
            )
        numbered.append((line, row))
    return numbered


def _csv(text: str, where: str) -> list[NumberedRow]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    try:
        reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        numbered = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        problem = f"{where}, line {reader.reader.line_num}, is not CSV: {error}"
        raise _bad_line(problem) from error
    columns = len(reader.fieldnames)
    for line, row in numbered:
        if None in row:  # else the rest of the caption would be lost in silence
            fields = columns + len(row[None])
            raise DataError(
                f"{where}, line {line}, has {fields} fields under {columns} columns",
                key="data.path",
                remedy="Put captions with commas in double quotes, or change data.path.",
            )
    return numbered


def _inside(folder: str, file_name: Any, where: str, listing: Listing) -> str:
    """The relative name that a metadata row means.

    A metadata file may come from elsewhere: DataError where it reaches outside the folder.
    """
    is_name = isinstance(file_name, str) and file_name.isprintable()
    if not is_name or not 0 < len(file_name) < 4096:
        shown = ascii(file_name)[:60]
        raise _bad_line(f"{where}: file_name must be the name of a picture, and is {shown}")
    name = posixpath.normpath(file_name)
    leads_up = name.split("/")[0] in ("..", "")
    if leads_up or not listing.holds(os.path.join(folder, file_name)):
        raise _bad_line(
            f"{where}: file_name {file_name!r} leads outside the folder; "
            "it must be a relative path inside it"
        )
    return name
