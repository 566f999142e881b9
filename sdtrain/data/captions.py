"""The captions of a folder of pictures: from metadata.jsonl, metadata.csv, or a .txt beside each. An error names file and line."""

import csv
import io
import json
import os
import posixpath
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdtrain.errors import DataError

METADATA = ("metadata.jsonl", "metadata.csv")
LAYOUTS = "metadata.jsonl or metadata.csv at its top with file_name and text, or a .txt beside each picture"


def some(names: Sequence[str]) -> str:
    """Up to three names, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read_captions(
    folder: str, names: Sequence[str], missing_captions: str
) -> list[tuple[str, str]]:
    """(relative name, caption) of every picture in `names`, sorted by name. DataError for a caption that is missing where it may not be."""
    metadata = [name for name in METADATA if os.path.isfile(os.path.join(folder, name))]
    if len(metadata) == 2:
        raise DataError(
            f"data.path={folder!r} holds both metadata.jsonl and metadata.csv; only one can be meant. Remove one, or change data.path."
        )
    if metadata:
        source = metadata[0]
        rows = _from_metadata(folder, source, names)
        listed = {name for name, _ in rows}
        without = [name for name in names if name not in listed]
        if without and missing_captions == "error":
            raise DataError(
                f"{len(without)} of {len(names)} pictures in data.path={folder!r} have no row in {source}: {some(without)}. "
                f"Add their rows, remove them, or set data.missing_captions=empty to train them with the empty caption."
            )
        rows = sorted(rows + [(name, "") for name in without], key=lambda row: row[0])
    else:
        source = "a .txt file beside them"
        rows = [(name, _caption_beside(folder, name)) for name in names]
    empty = [name for name, caption in rows if not caption]
    if empty and missing_captions == "error":
        how_many = (
            "none has a caption"
            if len(empty) == len(rows)
            else f"{len(empty)} of {len(rows)} have none"
        )
        raise DataError(
            f"Of the pictures in data.path={folder!r} {how_many}, first {empty[0]}; captions were looked for in {source}. "
            f"They must be in {LAYOUTS}. Write them, change data.path, or set data.missing_captions=empty to train with the empty caption."
        )
    return rows


def _clean(caption: str) -> str:
    # NUL ends a string in some tokenizers; line breaks differ between the three layouts for the same caption.
    return " ".join(caption.replace("\0", "").split())


def _text(path: str) -> str:
    try:
        return Path(path).read_bytes().decode("utf-8-sig").replace("\0", "")
    except UnicodeDecodeError as error:
        raise DataError(
            f"The captions in {path!r} are not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}. "
            f"Write the file anew as UTF-8, or change data.path."
        ) from error
    except OSError as error:
        raise DataError(
            f"The captions in {path!r} cannot be read: {error.strerror}. Change its permissions, or data.path."
        ) from error


def _caption_beside(folder: str, name: str) -> str:
    beside = os.path.join(folder, os.path.splitext(name)[0] + ".txt")
    return _clean(_text(beside)) if os.path.isfile(beside) else ""


def _from_metadata(folder: str, source: str, names: Sequence[str]) -> list[tuple[str, str]]:
    """(relative name, caption) of each row of the metadata file; DataError for rows that name no picture inside the folder."""
    where = f"{source} of data.path={folder!r}"
    text = _text(os.path.join(folder, source))
    numbered = list(_jsonl(text, where) if source.endswith("jsonl") else _csv(text, where))
    column = next(
        (key for key in ("text", "caption") if any(key in row for _, row in numbered)), None
    )
    if column is None or not all("file_name" in row for _, row in numbered):
        line, seen = next(
            ((line, row) for line, row in numbered if "file_name" not in row),
            numbered[0] if numbered else (1, {}),
        )
        raise DataError(
            f"{where} needs the columns file_name and text (or caption); line {line} has {', '.join(map(str, seen)) or 'none'}. "
            f"Rename the columns, or change data.path."
        )
    known, rows, missing = set(names), [], []
    for line, row in numbered:
        name, caption = _inside(folder, row["file_name"], f"{where}, line {line}"), row.get(column)
        if (
            not isinstance(caption, str | None) or caption and re.search("[\ud800-\udfff]", caption)
        ):  # halves of a character are no text
            raise DataError(
                f"{where}, line {line}: the caption must be text, and is {caption!r}. Correct the line, or change data.path."
            )
        if name not in known and not os.path.isfile(os.path.join(folder, name)):
            missing.append(name)
        rows.append((name, _clean(caption or "")))
    if missing:
        raise DataError(
            f"{len(missing)} of {len(rows)} rows of {where} name pictures that are not there: {some(missing)}. "
            f"file_name is relative to the folder. Remove the rows, add the pictures, or change data.path."
        )
    return rows


def _jsonl(text: str, where: str) -> list[tuple[int, dict[str, Any]]]:
    numbered = []
    for line, content in enumerate(
        text.split("\n"), 1
    ):  # not splitlines: JSON allows U+2028 inside a string
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except (
            ValueError,
            RecursionError,
        ) as error:  # a number of thousands of digits, brackets without end
            raise DataError(
                f"{where}, line {line}, is not JSON that can be read: {error}. Correct the line, or change data.path."
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                f"{where}, line {line}, must be an object with file_name and text, and is {content[:60]}. Correct it, or change data.path."
            )
        numbered.append((line, row))
    return numbered


def _csv(text: str, where: str) -> list[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    try:
        reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        numbered = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise DataError(
            f"{where}, line {reader.reader.line_num}, is not CSV: {error}. Correct the line, or change data.path."
        ) from error
    for line, row in numbered:
        if None in row:  # else the rest of the caption would be lost in silence
            raise DataError(
                f"{where}, line {line}, has {len(reader.fieldnames) + len(row[None])} fields under {len(reader.fieldnames)} columns. "
                f"Put captions with commas in double quotes, or change data.path."
            )
    return numbered


def _inside(folder: str, file_name: Any, where: str) -> str:
    """The relative name that a metadata row means. A metadata file may come from elsewhere: it must not reach outside the folder."""
    if (
        not isinstance(file_name, str)
        or not file_name.isprintable()
        or not 0 < len(file_name) < 4096
    ):
        raise DataError(
            f"{where}: file_name must be the name of a picture, and is {ascii(file_name)[:60]}. Correct the line, or change data.path."
        )
    root = os.path.realpath(folder)
    resolved = os.path.realpath(os.path.join(folder, file_name))
    if os.path.commonpath([root, resolved]) != root or os.path.isabs(file_name):
        raise DataError(
            f"{where}: file_name {file_name!r} leads outside the folder; it must be a relative path inside it. "
            f"Correct it, or change data.path."
        )
    return posixpath.normpath(file_name)
