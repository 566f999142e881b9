"""Read the depth maps that sdtrain-sample gives a model."""

from collections.abc import Sequence

from sdtrain.data.crop import Transform, resize_to_cover
from sdtrain.errors import DataError
from sdtrain.generation.drawing import DepthMap, GivenPictures, StartPicture
from sdtrain.generation.start_pictures import picture_files, read_picture
from sdtrain.types import PictureSize


def read_depth_maps(depth: str, image_size: PictureSize) -> list[DepthMap]:
    """Return the depth maps of a file or folder, by name, scaled and cropped to one size.

    They are grey pictures; brighter is nearer. Raises DataError, which names `depth`, for one that
    cannot be read.

    Args:
        depth: the file or folder.
        image_size: side or (height, width) in pixels.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    size = (width, height)
    transform = Transform(image_size=width, crop="center", flip=False, seed=0)
    maps = []
    for file in picture_files(depth, "depth"):
        pixels = resize_to_cover(read_picture(str(file), "depth"), size)
        grey = transform.centred(pixels, size).mean(0, keepdim=True)
        maps.append(DepthMap(file, (grey + 1) / 2))
    return maps


def pair(starts: Sequence[StartPicture], maps: Sequence[DepthMap]) -> list[GivenPictures]:
    """Return what each picture is drawn from: a start picture, a depth map, or both.

    One depth map serves all start pictures; of several each belongs to the start picture at its
    place, by name. Raises DataError if their numbers differ.
    """
    if not starts:
        return [GivenPictures(depth=each) for each in maps] or [GivenPictures()]
    if not maps:
        return [GivenPictures(start=start) for start in starts]
    if len(maps) not in (1, len(starts)):
        raise DataError(
            f"has {len(maps)} depth maps for the {len(starts)} pictures of init_image",
            key="depth",
            remedy="Give one depth map, or one for each picture, in the order of their names.",
        )
    given = []
    for place, start in enumerate(starts):
        given.append(GivenPictures(start, maps[place % len(maps)]))
    return given
