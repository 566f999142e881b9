"""Turn RGB pictures into tensors of one size in [-1, 1]: resize, crop and flip with keyed random
draws.
"""

import hashlib
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from sdtrain.errors import UserError
from sdtrain.randomness import KeyedRandom


def covering_size(own: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Return the smallest (width, height) of the shape of `own` that covers `size`."""
    own_width, own_height = own
    width, height = size
    if width * own_height >= height * own_width:  # the width decides
        return width, width * own_height // own_width
    return height * own_width // own_height, height


def resize_to_cover(picture: Image.Image | Tensor, size: tuple[int, int]) -> Tensor:
    """Resize to the smallest uint8 [3, h, w] of the same shape that covers `size`, antialiased.

    picture: an RGB image, or a uint8 tensor [3, H, W]. size: (width, height).
    """
    pixels = F.pil_to_tensor(picture) if isinstance(picture, Image.Image) else picture
    own_height, own_width = pixels.shape[1:]
    width, height = covering_size((own_width, own_height), size)
    return F.resize(
        pixels, [height, width], interpolation=v2.InterpolationMode.BICUBIC, antialias=True
    )


def pixels_sha256(image: Tensor) -> bytes:
    """Return the SHA-256 of the bytes of a picture [3, H, W] in [-1, 1]."""
    return hashlib.sha256(((image + 1) * 127.5).round().byte().numpy().tobytes()).digest()


class Transform:
    """Crop to one size, flip, and scale to [-1, 1]: a pure function of (picture, seed, ordinal).

    The draws are KeyedRandom(seed, "transform").uniform(ordinal, 3): crop_y, crop_x, flip.
    crop="center" ignores the first two, flip=False the third, so that no setting changes the draws
    of another.
    """

    def __init__(
        self, *, image_size: int, crop: Literal["random", "center"], flip: bool, seed: int
    ) -> None:
        if crop not in ("random", "center"):
            raise UserError(
                "is none of random, center",
                key="data.crop",
                value=crop,
                remedy="Change data.crop.",
            )
        self.image_size = image_size
        self.crop = crop
        self.flip = flip
        self._random = KeyedRandom(seed, "transform")
        self._to_range = v2.Compose(
            [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]
        )

    def is_mirrored(self, ordinal: int) -> bool:
        """Return whether the visit `ordinal` sees a mirrored picture."""
        return self.flip and bool(self._random.uniform(ordinal, 3)[2] < 0.5)

    def centred(self, picture: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Return what crop="center" cuts out, as it is without a flip. Arguments as for a call."""
        width, height = size or (self.image_size, self.image_size)
        top = (picture.shape[1] - height) // 2
        left = (picture.shape[2] - width) // 2
        return self._to_range(F.crop(picture, top, left, height, width).contiguous())

    def __call__(
        self, picture: Tensor, ordinal: int, size: tuple[int, int] | None = None
    ) -> Tensor:
        """Return float32 [3, height, width] in [-1, 1].

        picture: uint8 [3, h, w], at least as high and wide. size: (width, height); None is a square
        of image_size.
        """
        width, height = size or (self.image_size, self.image_size)
        spare_y = picture.shape[1] - height
        spare_x = picture.shape[2] - width
        if self.crop == "random" or self.flip:
            crop_y, crop_x, flip = self._random.uniform(ordinal, 3)
        if self.crop == "random":
            top = int(crop_y * (spare_y + 1))
            left = int(crop_x * (spare_x + 1))
        else:
            top = spare_y // 2
            left = spare_x // 2
        # Contiguous, because Pillow stores channels last.
        cropped = F.crop(picture, top, left, height, width).contiguous()
        if self.flip and flip < 0.5:
            cropped = F.horizontal_flip(cropped)
        return self._to_range(cropped)
