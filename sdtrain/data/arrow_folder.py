"""Pictures in a folder that `datasets` has written with save_to_disk, read by memory map."""

import io
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from sdtrain.data.folder_state import Stamp
from sdtrain.data.image_column import (
    DEFAULT_COLUMNS,
    check_image_type,
    class_names,
    encoded_picture,
    has_paths,
    named_classes,
    values_of,
)
from sdtrain.data.stored import (
    FileStamps,
    NameIndex,
    are_names,
    check_names,
    folders_of,
    place_of_row,
    unreadable_error,
)
from sdtrain.errors import DataError

MARKERS = ("state.json", "dataset_dict.json")
"""A file of a saved data set, and of a saved dictionary of its splits."""


def is_arrow_folder(path: str) -> bool:
    """Whether save_to_disk has written the folder."""
    return any((Path(path) / marker).is_file() for marker in MARKERS)


class ArrowFolder:
    """The pictures of a data set in an Arrow folder. Implements `stored.Store`.

    A picture is called by its `path` if all have one of their own, else by SPLIT:ROW.

    Args:
        path: the folder.
        image: column of the pictures: their encoded bytes, or a struct of `bytes` and `path`.
        split: which one of several; None if there is only one, or for `train`.

    Raises DataError for a folder that is damaged, or lacks the column or the split.
    """

    default_columns = DEFAULT_COLUMNS
    notes: Sequence[str] = ()

    def __init__(self, path: str, image: str, split: str | None = None) -> None:
        from datasets import DatasetDict, load_from_disk  # here: the import takes a second

        self.path = path
        self.image = image
        stamps = FileStamps(_files_in(Path(path)))
        try:
            data = load_from_disk(path)
        except Exception as error:  # a damaged folder may raise nearly anything
            reason = " ".join(str(error).split())[:200]
            raise unreadable_error(path, f"cannot be read by datasets: {reason}") from error
        if isinstance(data, DatasetDict):
            split = choose_split(list(data), split, path)
            data = data[split]
        elif split is not None:
            raise DataError(
                f"has no effect: {path!r} has no splits",
                key="data.split",
                value=split,
                remedy="Remove it.",
            )
        self._data = data
        folder = Path(path) / split if split else Path(path)
        self._stamps = stamps.in_folder(str(folder))
        self.files = self._stamps.listed
        if not self.files:
            raise unreadable_error(path, f"has no files of the split {split!r} in a folder of it")
        table = data.data.table
        check_image_type(table.schema, image, path)
        self.columns = [name for name in table.column_names if name != image]
        self._class_names = class_names(table.schema)
        paths = self._picture_paths()
        self._has_names = are_names(paths)
        self.names = paths if self._has_names else self._places_of_rows(split)
        check_names(self.names)
        self._places = NameIndex(self.names)
        # With the column, because each has other pictures under the same names.
        self.identity = f"{path}: {split}: {image}"

    def _picture_paths(self) -> list[str | None]:
        column = self._data.data.table.column(self.image)
        if not has_paths(column.type):
            return [None]
        parts = [chunk.field("path") for chunk in column.chunks]
        return values_of(pa.chunked_array(parts, column.type.field("path").type), self.path)

    def _places_of_rows(self, split: str | None) -> list[str]:
        name = split or Path(self.path).name
        return [place_of_row(name, row) for row in range(len(self._data))]

    def values(self, column: str) -> list[Any]:
        values = values_of(self._data.data.table.column(column), self.path)
        return named_classes(values, self._class_names.get(column))

    def rows(self) -> Sequence[Hashable]:
        return range(len(self.names))

    def folders(self) -> list[str]:
        return folders_of(self.names) if self._has_names else [""] * len(self.names)

    def forget_values(self) -> None:
        """Do nothing: values are read when they are asked for."""

    def open(self, name: str) -> BinaryIO:
        self._stamps.check_all()
        value = self._data.data.table.column(self.image)[self._places.place(name)]
        return io.BytesIO(encoded_picture(value, self.location(name)))

    def stamps(self, names: Iterable[str]) -> dict[str, Stamp]:
        """Return the size of all files of the data set, and the time of their last change."""
        found = [stamp for stamp in self.files.values() if stamp is not None]
        total = (sum(size for size, _ in found), max(changed_at for _, changed_at in found))
        return dict.fromkeys(names, total)

    def check_unchanged(self, names: Iterable[str]) -> None:
        self._stamps.check_all()

    def location(self, name: str) -> str:
        return f"{self.path}: {name}"


def _files_in(folder: Path) -> list[str]:
    """Return the paths of the files in a folder, and in the folders in it, which are its splits."""
    found = sorted([*folder.glob("*"), *folder.glob("*/*")])
    return [str(path) for path in found if path.is_file()]


def choose_split(splits: Sequence[str], wanted: str | None, path: str) -> str:
    """Return the name of a split: the one that is wanted, or the only one, or `train`.

    Raises DataError if there is no such split.
    """
    if wanted is None:
        wanted = splits[0] if len(splits) == 1 else "train"
    if wanted not in splits:
        raise DataError(
            f"is no split of {path!r}; it has {', '.join(splits) or 'none'}",
            key="data.split",
            value=wanted,
            remedy="Set data.split to one of them.",
        )
    return wanted
