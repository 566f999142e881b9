"""A frozen text encoder's contexts are cached, each distinct caption once."""

import pytest
import torch
from stable_diffusion import save_pipeline

from sdtrain.conditioning.clip import Clip
from sdtrain.conditioning.interface import Inputs
from sdtrain.conditioning.text import Text
from sdtrain.data.cached import empty_context_of


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("pipeline") / "pipeline")


def clip_of(pipeline, **arguments) -> Clip:
    text_encoder = str(pipeline / "text_encoder")
    given = {"architecture": text_encoder, "weights": text_encoder} | arguments
    return Clip(tokenizer=str(pipeline / "tokenizer"), **given)


def context_of(clip: Clip, caption: str) -> torch.Tensor:
    labels = torch.zeros(1, dtype=torch.long)
    inputs = Inputs([caption], labels, labels.bool(), latent_size=(1, 1))
    with torch.no_grad():
        return clip(inputs).context[0]


def test_rows_bring_the_context_of_their_caption(images_of, pictures, cached, pipeline):
    clip = clip_of(pipeline)
    data = images_of(pictures, captions="one")
    made = cached(data, conditioner=clip)
    seen = set()
    for ordinal in range(30):
        row = made.data.split("train")[ordinal % 9, ordinal]
        seen.add(row.caption)
        torch.testing.assert_close(row.context, context_of(clip, row.caption))
    assert len(seen) > 5
    torch.testing.assert_close(empty_context_of(made.data), context_of(clip, ""))
    # 12 pictures, of which two share a caption, and the empty one
    assert "12 of 12 captions" in made.printed
    assert "all 12 captions" in cached(data, conditioner=clip).printed


def test_a_frozen_text_encoder_takes_contexts_and_a_trained_one_does_not(pipeline):
    context = torch.randn(1, 24, 16)
    labels = torch.zeros(1, dtype=torch.long)
    inputs = Inputs(["a"], labels, labels.bool(), latent_size=(1, 1), context=context)
    frozen = clip_of(pipeline)
    frozen.net = None  # is not run
    assert torch.equal(frozen(inputs).context, context)
    assert not torch.equal(clip_of(pipeline, trained=True)(inputs).context, context)


def test_why_captions_are_not_cached_is_said(images_of, pictures, cached, pipeline):
    text = Text(context_dim=16, layers=1, heads=2, max_length=24, tokenizer="data/tokenizer")
    for conditioner, arguments in (
        (text, {}),
        (clip_of(pipeline, trained=True), {}),
        (clip_of(pipeline), {"shuffle_tags": True}),
    ):
        made = cached(images_of(pictures, **arguments), conditioner=conditioner)
        assert made.data.split("train")[0, 0].context is None
        assert "no captions" in made.printed
