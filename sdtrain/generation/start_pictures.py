"""Read the pictures with which image-to-image begins, and the mask of inpainting."""

from pathlib import Path

from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d
from torchvision.transforms.v2 import functional as F

from sdtrain.data.crop import Transform, covering_size, resize_to_cover
from sdtrain.data.decode import WHITE, open_picture, picture_suffixes
from sdtrain.errors import DataError, UserError
from sdtrain.generation.drawing import StartPicture
from sdtrain.latent_diffusion import LatentDiffusion
from sdtrain.types import PictureSize

WHITE_FROM = 128
"""Least grey value, of 255, that counts as white in a mask."""

BLACK = (0, 0, 0)
"""What lies behind transparent pixels of a mask: they are not masked."""

REMEDY = "Set it to a picture or a folder of pictures."


def read_start_pictures(
    init_image: str, mask: str | None, image_size: PictureSize, model: LatentDiffusion
) -> list[StartPicture]:
    """Return the pictures of a file or a folder, by name, scaled and cropped to one size.

    Args:
        init_image: the file or folder.
        mask: a picture of the size of each of them, or None.
        image_size: side or (height, width) in pixels.
        model: that will draw from them.

    Raises UserError for a model without an encoder, DataError for a picture or mask that cannot be
    read or does not fit.
    """
    if not callable(getattr(model.autoencoder, "encode", None)):
        raise UserError(
            f"has no effect: {type(model.autoencoder).__name__} has no method `encode`",
            key="init_image",
            value=init_image,
            remedy="Remove it, or give another checkpoint.",
        )
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    size = (width, height)
    mask_pixels = None if mask is None else read_picture(mask, "mask", BLACK)
    starts = []
    for file in picture_files(init_image, "init_image"):
        pixels = read_picture(str(file), "init_image")
        cropped_mask = None
        if mask_pixels is not None:
            _check_same_size(mask_pixels, pixels, mask, file)
            cropped_mask = _cropped_mask(mask_pixels, size, mask)
        own_size = (pixels.shape[2], pixels.shape[1])
        starts.append(StartPicture(file, own_size, _cropped(pixels, size), cropped_mask))
    return starts


def picture_files(path: str, key: str) -> list[Path]:
    """Return the file, or the pictures in the folder in the order of their names.

    Raises DataError, which names the key, for a folder that cannot be read or has none.
    """
    if not Path(path).is_dir():
        return [Path(path)]
    try:
        inside = sorted(Path(path).iterdir())
    except OSError as error:
        raise DataError(
            f"cannot be read: {error.strerror}", key=key, value=path, remedy=REMEDY
        ) from error
    suffixes = picture_suffixes()
    files = [file for file in inside if file.suffix.lower() in suffixes]
    if not files:
        raise DataError("is a folder without pictures", key=key, value=path, remedy=REMEDY)
    return files


def read_picture(path: str, key: str, background: tuple[int, int, int] = WHITE) -> Tensor:
    """Return a picture, uint8 [3, H, W]. Raises DataError, which names the key."""
    try:
        return F.pil_to_tensor(open_picture(path, background=background))
    except DataError as error:
        raise DataError(error.problem, key=key, remedy=f"Change {key}.") from error


def _cropped(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Return what covers the middle of a picture, float32 [3, height, width] in [-1, 1]."""
    transform = Transform(image_size=size[0], crop="center", flip=False, seed=0)
    return transform.centred(resize_to_cover(pixels, size), size)


def _check_same_size(mask: Tensor, picture: Tensor, name: str, file: Path) -> None:
    if mask.shape[1:] != picture.shape[1:]:
        mask_height, mask_width = mask.shape[1:]
        height, width = picture.shape[1:]
        raise DataError(
            f"has {mask_width} x {mask_height} pixels, but {file} has {width} x {height}",
            key="mask",
            value=name,
            remedy="Give a mask of the size of init_image.",
        )


def _cropped_mask(mask: Tensor, size: tuple[int, int], name: str) -> Tensor:
    """Return the mask for the middle of its picture, bool [1, height, width].

    A pixel is masked if any of those that it is scaled down from is white. Raises DataError if all
    or none are.
    """
    own_height, own_width = mask.shape[1:]
    width, height = covering_size((own_width, own_height), size)
    is_white = mask.float().mean(0, keepdim=True) >= WHITE_FROM
    scaled = adaptive_max_pool2d(is_white.float(), (height, width))
    cropped = F.center_crop(scaled, [size[1], size[0]]) > 0
    for colour, consequence, is_so in (
        ("black", "nothing would be drawn", not bool(cropped.any())),
        ("white", "nothing of init_image would be kept", bool(cropped.all())),
    ):
        if is_so:
            raise DataError(
                f"is {colour} in all of the part that is drawn, so that {consequence}",
                key="mask",
                value=name,
                remedy="Paint white what should be drawn anew and black what should be kept, or "
                "remove mask.",
            )
    return cropped
