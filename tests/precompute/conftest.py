"""Folders of small captioned pictures, and caches of their latents."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from sdtrain.conditioning.none import Nothing
from sdtrain.data.images import Images
from sdtrain.models.autoencoder import Autoencoder
from sdtrain.precompute.cache import CacheRequest, with_cache

SIDE = 16


def painted(path: Path, number: int, size: tuple[int, int] = (SIDE + 4, SIDE)) -> None:
    """A picture that no other number has, of (width, height), with something to see in it."""
    random = np.random.default_rng(number)
    coarse = random.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder of 12 pictures, each with a caption; two have the same one."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(12):
        painted(folder / f"{number:02}.png", number)
        (folder / f"{number:02}.txt").write_text(f"caption {max(1, number)}")
    return folder


@pytest.fixture(scope="session")
def autoencoder() -> Autoencoder:
    """The trained one of the shapes."""
    return Autoencoder(path="data/shapes_autoencoder", sample_posterior=True)


@pytest.fixture(scope="session")
def paint():
    return painted


@pytest.fixture(scope="session")
def images_of():
    """images_of(FOLDER, flip=False, ...) -> the data set, of squares of SIDE pixels."""

    def make(folder: Path, **arguments) -> Images:
        given = {"image_size": SIDE, "crop": "center", "flip": True} | arguments
        return Images(path=str(folder), **given)

    return make


class Made:
    """What `cached` returns: the data set with its cache, and what was printed."""

    def __init__(self, data, printed: str) -> None:
        self.data = data
        self.printed = printed


@pytest.fixture
def cached(tmp_path, autoencoder):
    """cached(DATA, dtype="fp16", ...) -> Made. As `sdtrain data.cache=FOLDER` makes it."""

    def make(data, encoder=None, conditioner=None, **changes) -> Made:
        printed = io.StringIO()
        request = CacheRequest(
            folder=str(tmp_path / "cache"),
            dtype="fp32",
            autoencoder={"autoencoder": autoencoder.sha256},
            conditioner={"conditioner": "none"},
            num_workers=0,
            device=torch.device("cpu"),
            console=Console(file=printed, width=200),
        )
        request = replace(request, **changes)
        conditioner = conditioner or Nothing(context_dim=4)
        data = with_cache(data, encoder or autoencoder, conditioner, request)
        return Made(data, printed.getvalue())

    return make


class Counting:
    """An autoencoder that counts the pictures that it encodes. Fillers of a batch count as one."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        self.autoencoder = autoencoder
        self.seen: set[bytes] = set()

    def moments(self, images):
        for image in images:
            if image.any():  # a black one only measures the time
                self.seen.add(image.numpy().tobytes())
        return self.autoencoder.moments(images)

    def to(self, device):
        return self

    def modules(self):
        return iter(())

    def eval(self):
        return self


@pytest.fixture
def counting(autoencoder) -> Counting:
    return Counting(autoencoder)
