"""Turn RGB pictures into squares in [-1, 1]: resize, crop and flip with keyed random draws."""

from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from sdtrain.errors import UserError
from sdtrain.randomness import KeyedRandom


def resize_short_side(picture: Image.Image | Tensor, image_size: int) -> Tensor:
    """Resize to uint8 [3, h, w] with min(h, w) = image_size, antialiased.

    picture: an RGB image, or a uint8 tensor [3, H, W].
    """
    pixels = F.pil_to_tensor(picture) if isinstance(picture, Image.Image) else picture
    return F.resize(
        pixels, [image_size], interpolation=v2.InterpolationMode.BICUBIC, antialias=True
    )


class Transform:
    """Crop to a square, flip, and scale to [-1, 1]: a pure function of (picture, seed, ordinal).

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

    def __call__(self, picture: Tensor, ordinal: int) -> Tensor:
        """Return a square, float32 [3, image_size, image_size] in [-1, 1].

        picture: uint8 [3, h, w], h and w at least image_size.
        """
        size = self.image_size
        spare_y = picture.shape[1] - size
        spare_x = picture.shape[2] - size
        if self.crop == "random" or self.flip:
            crop_y, crop_x, flip = self._random.uniform(ordinal, 3)
        if self.crop == "random":
            top = int(crop_y * (spare_y + 1))
            left = int(crop_x * (spare_x + 1))
        else:
            top = spare_y // 2
            left = spare_x // 2
        # Contiguous, because Pillow stores channels last.
        cropped = F.crop(picture, top, left, size, size).contiguous()
        if self.flip and flip < 0.5:
            cropped = F.horizontal_flip(cropped)
        return self._to_range(cropped)
