"""Read or estimate the depth maps that sdtrain-sample gives a model."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from sdtrain.data.crop import Transform, covering_size, resize_to_cover
from sdtrain.errors import DataError
from sdtrain.generation.drawing import DepthMap, GivenPictures, StartPicture
from sdtrain.generation.start_pictures import picture_files, read_picture
from sdtrain.models.depth_estimator import DepthEstimator
from sdtrain.types import PictureSize

LARGEST_DIFFERENCE = 1
"""Pixels by which the shapes of a picture and its depth map may differ, from rounding."""


def read_depth_maps(depth: str, image_size: PictureSize) -> list[DepthMap]:
    """Return the depth maps of a file or folder, by name, scaled and cropped to one size.

    They are grey pictures; brighter is nearer. Raises DataError, which names `depth`, for one that
    cannot be read.

    Args:
        depth: the file or folder.
        image_size: side or (height, width) in pixels.
    """
    maps = []
    for file in picture_files(depth, "depth"):
        pixels = read_picture(str(file), "depth")
        own_size = (pixels.shape[2], pixels.shape[1])
        maps.append(DepthMap(file, own_size, _cropped(pixels, image_size)))
    return maps


def estimate_depth_maps(
    starts: Sequence[StartPicture],
    depth_model: str,
    image_size: PictureSize,
    device: torch.device,
) -> list[DepthMap]:
    """Return the depth map of each start picture, as a depth model estimates it.

    Raises UserError, which names `depth_model`, for a model that cannot be read.

    Args:
        starts: the pictures.
        depth_model: folder or hub id of the model.
        image_size: side or (height, width) in pixels.
        device: where the model runs.
    """
    estimator = DepthEstimator(depth_model, "depth_model", device)
    maps = []
    for start in starts:
        picture = F.to_pil_image(read_picture(str(start.file), "init_image"))
        estimated = F.pil_to_tensor(estimator(picture)).expand(3, -1, -1)
        maps.append(DepthMap(None, start.own_size, _cropped(estimated, image_size)))
    return maps


def _cropped(pixels: Tensor, image_size: PictureSize) -> Tensor:
    """Return what covers the middle of a depth map, float32 [1, height, width] in [0, 1].

    pixels: uint8 [3, H, W].
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    size = (width, height)
    transform = Transform(image_size=width, crop="center", flip=False, seed=0)
    grey = transform.centred(resize_to_cover(pixels, size), size).mean(0, keepdim=True)
    return (grey + 1) / 2


def pair(starts: Sequence[StartPicture], maps: Sequence[DepthMap]) -> list[GivenPictures]:
    """Return what each picture is drawn from: a start picture, a depth map, or both.

    One depth map serves all start pictures; of several each belongs to the start picture at its
    place, by name. Raises DataError if their numbers differ, or the shapes of two that belong
    together.
    """
    if not starts:
        return [GivenPictures(depth=each) for each in maps] or [GivenPictures()]
    if not maps:
        return [GivenPictures(start=start) for start in starts]
    if len(maps) not in (1, len(starts)):
        raise DataError(
            f"depth has {len(maps)} depth maps for the {len(starts)} pictures of init_image",
            key="depth",
            remedy="Give one depth map, or one for each picture, in the order of their names.",
        )
    given = []
    for place, start in enumerate(starts):
        depth = maps[place % len(maps)]
        _check_shape(start, depth)
        given.append(GivenPictures(start, depth))
    return given


def _check_shape(start: StartPicture, depth: DepthMap) -> None:
    height, width = start.image.shape[1:]
    of_picture = covering_size(start.own_size, (width, height))
    of_map = covering_size(depth.own_size, (width, height))
    differences = [abs(one - other) for one, other in zip(of_picture, of_map, strict=True)]
    if max(differences) > LARGEST_DIFFERENCE:
        map_pixels = " x ".join(map(str, depth.own_size))
        picture_pixels = " x ".join(map(str, start.own_size))
        raise DataError(
            f"The depth map {depth.file} has {map_pixels} pixels, but {start.file} has "
            f"{picture_pixels}, which is of another shape",
            key="depth",
            remedy="Set depth to a depth map of the whole picture.",
        )
