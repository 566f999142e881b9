"""Columns of Arrow and Parquet data as the datasets library stores them: pictures, class labels."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from sdtrain.data.listing import shortened
from sdtrain.data.stored import unreadable_error
from sdtrain.errors import DataError

DEFAULT_COLUMNS = {
    "image": ("image",),
    "caption": ("text", "caption"),
    "label": ("label",),
    "weight": ("weight",),
}
"""{role: columns that have it by default}; the first that exists is taken."""


def is_bytes(type_: pa.DataType) -> bool:
    """Whether the values are bytes, whatever the length of their offsets."""
    return pa.types.is_binary(type_) or pa.types.is_large_binary(type_)


def check_column_names(schema: pa.Schema, path: str) -> None:
    """Raise DataError if two columns have the same name."""
    repeated = [name for name, count in Counter(schema.names).items() if count > 1]
    if repeated:
        raise unreadable_error(path, f"has several columns called {shortened(repeated)}")


def check_image_type(schema: pa.Schema, image: str, path: str) -> None:
    """Raise DataError if the schema has no column `image` with encoded pictures."""
    if image not in schema.names:
        raise DataError(
            f"is no column of {path!r}; its columns are {', '.join(schema.names)}",
            key="data.columns.image",
            value=image,
            remedy="Set data.columns.image to the column of the pictures.",
        )
    found = schema.field(image).type
    stored = found
    if pa.types.is_struct(found) and found.get_field_index("bytes") >= 0:
        stored = found.field("bytes").type
    if not is_bytes(stored):
        raise DataError(
            f"is a column of {path!r} that holds {found}; it must hold encoded pictures: bytes, or "
            f"a struct with bytes. The columns are {', '.join(schema.names)}",
            key="data.columns.image",
            value=image,
            remedy="Set data.columns.image to the column of the pictures.",
        )


def has_paths(type_: pa.DataType) -> bool:
    """Whether pictures are stored with the paths of their files."""
    if not pa.types.is_struct(type_) or type_.get_field_index("path") < 0:
        return False
    stored = type_.field("path").type
    return pa.types.is_string(stored) or pa.types.is_large_string(stored)


def encoded_picture(value: pa.Scalar, location: str) -> bytes:
    """Return the bytes of a picture. Raises DataError if there are none.

    A path without bytes is not opened: the author of a data set must not be able to choose which
    files of this machine are read.
    """
    content = value["bytes"] if isinstance(value, pa.StructScalar) and value.is_valid else value
    if not content.is_valid:
        raise DataError(
            f"The picture {location!r} has no bytes: only its path is stored, or nothing",
            key="data.path",
            remedy="Write the data set with its pictures embedded, or set data.on_error=skip.",
        )
    return content.as_py()


def values_of(column: pa.ChunkedArray, path: str) -> list[Any]:
    """Return the values of a column. Raises DataError for text that is not UTF-8."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError as error:
        raise unreadable_error(path, "has a column with text that is not UTF-8") from error


def class_names(schema: pa.Schema) -> dict[str, Sequence[str]]:
    """Return {column: names of its classes} of the columns that datasets calls ClassLabel."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        named = {}
        for column, feature in features.items():
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
                named[column] = [str(name) for name in feature["names"]]
        return named
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}  # a file of another library


def named_classes(values: list[Any], names: Sequence[str] | None) -> list[Any]:
    """Return the names of classes in place of their numbers; None for -1, which means no class."""
    if names is None:
        return values
    known = dict(enumerate(names))
    return [known.get(value) for value in values]
