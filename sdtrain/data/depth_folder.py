"""Read the depth maps of a folder, one for each picture of a data set."""

import os
from pathlib import Path, PurePosixPath

from torch import Tensor

from sdtrain.data.crop import covering_size, resize_to_cover
from sdtrain.data.decode import open_picture, picture_suffixes
from sdtrain.errors import DataError


class DepthFolder:
    """Depth maps named as the pictures are: that of cats/1.jpg is cats/1 with any suffix.

    A depth map is a grey picture of its picture's shape, in which brighter is nearer. Raises
    DataError if there is no such folder.
    """

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(os.path.expanduser(path))
        if not os.path.isdir(self.path):
            raise DataError(
                "is no folder",
                key="data.depth",
                value=path,
                remedy="Set data.depth to a folder with a depth map for each picture.",
            )

    def __call__(self, name: str, own_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """Return the depth map of a picture, uint8 [3, h, w]: the smallest that covers a size.

        Raises DataError for a missing or broken one, and for one of another shape.

        Args:
            name: of the picture.
            own_size: (width, height) of the picture in its own pixels.
            size: (width, height) to cover.
        """
        path = self._file_of(name)
        try:
            depth = open_picture(str(path))
        except DataError as error:
            raise DataError(
                error.problem, key="data.depth", remedy="Repair the depth map, or make it anew."
            ) from error
        expected = covering_size(own_size, size)
        found = covering_size(depth.size, size)
        if max(abs(found[0] - expected[0]), abs(found[1] - expected[1])) > 1:
            raise DataError(
                f"The depth map {str(path)!r} has {depth.width} x {depth.height} pixels, but its "
                f"picture has {own_size[0]} x {own_size[1]}, which is of another shape",
                key="data.depth",
                remedy="Make it of the whole picture.",
            )
        return resize_to_cover(depth.resize(expected) if found != expected else depth, size)

    def _file_of(self, name: str) -> Path:
        stem = Path(self.path) / PurePosixPath(name).with_suffix("")
        for suffix in (".png", *sorted(picture_suffixes())):
            file = stem.with_name(stem.name + suffix)
            if file.is_file():
                return file
        raise DataError(
            f"There is no depth map {stem.name}.png of picture {name!r} in {str(stem.parent)!r}",
            key="data.depth",
            remedy="Add it, or remove the picture.",
        )
