"""A row that brings the autoencoder's moments is trained like its picture, and the autoencoder is
not asked.
"""

from dataclasses import replace

import pytest
import torch

from sdtrain.assemble.model import build_model
from sdtrain.data.draws import Collate
from sdtrain.data.shapes import Shapes
from sdtrain.diffusion.noise import Gaussian

ORDINALS = list(range(8))


@pytest.fixture
def model(composed, tmp_path):
    """The autoencoder that ships with the package, and a network of a few thousand weights."""
    cfg = composed(
        "model.unet.block_channels=[16,16]",
        "model.unet.norm_groups=8",
        "model.unet.head_dim=8",
        "model.conditioner.context_dim=16",
        "model.conditioner.layers=1",
    )
    return build_model(cfg, tmp_path).eval()


def batch_of(model, rows, posterior):
    """The batch of `rows` as a run of the same seed draws it."""
    collate = Collate(
        seed=0,
        latent_shape=model.autoencoder.latent_shape(32),
        posterior=posterior,
        stratified=True,
        global_batch=len(rows),
        noise=Gaussian(),
    )
    return collate(rows, ORDINALS, len(rows))


@pytest.mark.parametrize("posterior", [False, True])
def test_moments_and_pictures_have_the_same_losses(model, monkeypatch, posterior):
    pictures = Shapes(size=8).split("train")
    rows = [pictures[ordinal, ordinal] for ordinal in ORDINALS]
    images = batch_of(model, rows, posterior)
    together = model.autoencoder.moments(images.image)
    cached = [replace(row, image=None, moments=m) for row, m in zip(rows, together, strict=True)]
    moments = batch_of(model, cached, posterior)
    assert moments.image is None
    with torch.no_grad():
        expected = model.losses(images)
        # The draw from the posterior is seen in the loss, so that leaving it out would be seen too.
        without = model.losses(replace(images, posterior=None))

        def encode(*_):
            raise AssertionError("the autoencoder was asked")

        monkeypatch.setattr(model.autoencoder.net, "encode", encode)
        losses = model.losses(moments)
        with pytest.raises(AssertionError, match="was asked"):
            model.losses(images)
    assert torch.equal(losses.per_sample, expected.per_sample)
    assert torch.equal(losses.t, expected.t)
    assert torch.equal(without.per_sample, expected.per_sample) == (not posterior)
