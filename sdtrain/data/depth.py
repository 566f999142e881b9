"""Read the depth maps of pictures: from a folder, or a column of a stored data set."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdtrain.data.columns import Columns
from sdtrain.data.crop import covering_size, resize_to_cover
from sdtrain.data.decode import PictureFile, open_picture, picture_suffixes
from sdtrain.data.listing import lies_in, shortened
from sdtrain.data.stored import NameIndex, Store
from sdtrain.data.stores import open_store
from sdtrain.errors import DataError
from sdtrain.paths import cache_folder

LONGEST_PART = 200
"""Bytes of a part of a picture's name that a file may have; file systems allow 255."""


class DepthFolder:
    """Depth maps named as the pictures are: that of cats/1.jpg is cats/1.jpg.png, or else cats/1
    with any suffix.

    A depth map is a grey picture of its picture's shape, in which brighter is nearer. Implements
    `split.DepthOf`.

    Args:
        path: the folder. Raises DataError if there is none.
    """

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(os.path.expanduser(path))
        if not path or not os.path.isdir(self.path):
            raise DataError(
                "is no folder",
                key="data.depth",
                value=path,
                remedy="Set data.depth to a folder with a depth map for each picture.",
            )

    def __call__(self, name: str, own_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
        path = self._file_of(name)
        try:
            depth = open_picture(str(path))
        except DataError as error:
            raise DataError(
                error.problem,
                key="data.depth",
                remedy="Repair this depth map, or change data.depth.",
            ) from error
        return fitted_map(depth, own_size, size, place=str(path), key="data.depth")

    def _file_of(self, name: str) -> Path:
        for file in self._candidates(name):
            if file.is_file():
                return file
        raise self._missing_error([name])

    def _candidates(self, name: str) -> Iterator[Path]:
        """Yield the files that may be the depth map of a picture, the preferred one first."""
        full = map_file(self.path, name)
        yield full
        stem = full.with_suffix("")
        suffixes = picture_suffixes()
        if stem.suffix.lower() in suffixes:
            stem = stem.with_suffix("")
        for suffix in (".png", *sorted(suffixes)):
            yield stem.with_name(stem.name + suffix)

    def check_complete(self, names: Iterable[str]) -> None:
        """Raise DataError if pictures have no depth map."""
        files = set()
        for folder, _, inside in os.walk(self.path, followlinks=True):
            files |= {os.path.join(folder, file) for file in inside}
        missing = []
        for name in names:
            if not any(str(file) in files for file in self._candidates(name)):
                missing.append(name)
        if missing:
            raise self._missing_error(missing)

    def _missing_error(self, names: list[str]) -> DataError:
        count = "1 picture" if len(names) == 1 else f"{len(names)} pictures"
        return DataError(
            f"There is no depth map of {count} in {self.path!r}: {shortened(names)}. Each needs "
            "one of its name, with any suffix of a picture",
            key="data.depth",
            remedy="Add them, change data.depth, or set data.depth_model, which makes depth maps.",
        )


class EstimatedDepth(DepthFolder):
    """Depth maps that a depth model makes before the first of them is read, see
    `precompute.depth`.

    Args:
        model: folder or hub id of the model.
        path: folder of the depth maps, which need not exist; None for one in the user's cache.
        source: names the pictures, such as the path of their folder.
    """

    def __init__(self, model: str, path: str | None, source: str) -> None:
        self.model = model
        if path is None:
            key = hashlib.sha256(f"{model}\n{source}".encode(errors="surrogateescape"))
            path = str(cache_folder() / "depth" / key.hexdigest()[:16])
        self.path = os.path.abspath(os.path.expanduser(path))

    def check_complete(self, names: Iterable[str]) -> None:
        """Do nothing: what is missing is made."""


def blank_depth_map(name: str, own_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Return a black depth map, whatever the picture shows. Implements `split.DepthOf`."""
    width, height = covering_size(own_size, size)
    return torch.zeros(3, height, width, dtype=torch.uint8)


class DepthColumn:
    """Depth maps that are stored beside the pictures. Implements `split.DepthOf`.

    Args:
        pictures: the data set.
        maps: the same data set, with the depth maps as its pictures.
        column: that they are in.

    Raises DataError for a picture without a depth map.
    """

    def __init__(self, pictures: Store, maps: Store, column: str) -> None:
        self.column = column
        self.maps = maps
        place_of_row = {row: place for place, row in enumerate(maps.rows())}
        places = []
        for name, row in zip(pictures.names, pictures.rows(), strict=True):
            if row not in place_of_row:
                raise DataError(
                    f"has no depth map of picture {name!r}",
                    key="data.columns.depth",
                    value=column,
                    remedy="Add it, or change data.columns.depth.",
                )
            places.append(place_of_row[row])
        maps.forget_values()
        # Arrays, because the workers of a loader share them.
        self._index = NameIndex(pictures.names)
        self._places = np.array(places, np.int64)

    def __call__(self, name: str, own_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
        map_name = self.maps.names[self._places[self._index.place(name)]]
        place = self.maps.location(map_name)
        try:
            with self.maps.open(map_name) as file:
                depth = open_picture(PictureFile(file, place))
        except DataError as error:
            if error.key != "data.path":
                raise
            raise _column_error(error, self.column) from error
        return fitted_map(depth, own_size, size, place=place, key="data.columns.depth")


def open_depth_column(
    pictures: Store, columns: Columns, path: str, split: str | None, revision: str | None
) -> DepthColumn | None:
    """Return the depth maps of the column columns.depth; None if it names none.

    Raises DataError for a column that does not hold depth maps. The arguments are those with which
    `open_store` has opened the pictures.
    """
    if columns.depth is None:
        return None
    try:
        maps = open_store(path, split=split, image=columns.depth, revision=revision)
    except DataError as error:
        raise _column_error(error, columns.depth) from error
    return DepthColumn(pictures, maps, columns.depth)


def _column_error(error: DataError, column: str) -> DataError:
    names_column = {"value": column} if error.has_value else {}
    return DataError(
        error.problem,
        key="data.columns.depth",
        **names_column,
        remedy="Set data.columns.depth to the column of the depth maps.",
    )


def map_file(folder: str, name: str) -> Path:
    """Return the file of a picture's depth map, as sdtrain writes it: one for each name.

    A name that leads out of the folder is replaced by its hash, because the author of a data set
    must not be able to choose which files of this machine are written; so is one that is too long,
    and one that is not the shortest for its file.
    """
    parts = name.split("/")
    is_plain = all(part not in ("", ".", "..") for part in parts)
    encoded = name.encode(errors="surrogateescape")
    if not is_plain or max(map(len, encoded.split(b"/"))) > LONGEST_PART:
        name = hashlib.sha256(encoded).hexdigest()
    return Path(folder) / f"{name}.png"


def depth_of_folder(depth: str | None, depth_model: str | None, source: str) -> DepthFolder | None:
    """Return the depth maps of data.depth and data.depth_model; None if both are None.

    source: names the pictures: of a folder its path, in which depth maps would count as pictures.
    Raises DataError if the folder of given ones does not exist.
    """
    if depth and lies_in(os.path.abspath(os.path.expanduser(depth)), source):
        raise DataError(
            f"lies in {source!r}, all of whose pictures are trained",
            key="data.depth",
            value=depth,
            remedy="Set data.depth to a folder outside data.path.",
        )
    if depth_model is not None:
        return EstimatedDepth(depth_model, depth, source)
    return None if depth is None else DepthFolder(depth)


def fitted_map(
    depth: Image.Image,
    own_size: tuple[int, int],
    size: tuple[int, int],
    *,
    place: str,
    key: str,
) -> Tensor:
    """Return a depth map, uint8 [3, h, w]: the smallest of its picture's shape that covers a size.

    Raises DataError if it has another shape than its picture.

    Args:
        depth: an RGB image.
        own_size: (width, height) of the picture in its own pixels.
        size: (width, height) to cover.
        place: names the depth map in an error.
        key: that has to be changed.
    """
    expected = covering_size(own_size, size)
    found = covering_size(depth.size, size)
    if max(abs(found[0] - expected[0]), abs(found[1] - expected[1])) > 1:
        raise DataError(
            f"The depth map {place!r} has {depth.width} x {depth.height} pixels, but its "
            f"picture has {own_size[0]} x {own_size[1]}, which is of another shape",
            key=key,
            remedy=f"Make it of the whole picture, or change {key}.",
        )
    return resize_to_cover(depth.resize(expected) if found != expected else depth, size)
