"""Captions become tokens where a batch is made, in the workers of the loader, not in the step."""

from dataclasses import replace

import pytest
import torch

from sdtrain.conditioning.interface import Inputs


@pytest.fixture(scope="module")
def parts(planned, built, tiny):
    return built(planned(*tiny("model.caption_dropout=0.5", "data.num_workers=1")))


@pytest.fixture(scope="module")
def batch(parts):
    return next(iter(parts.datamodule.train_dataloader()))


def test_a_batch_brings_the_tokens_of_its_captions_or_of_the_empty_one(parts, batch):
    model = parts.module.model
    tokenizer = model.conditioner.tokenizer
    dropped = batch.drop < 0.5
    assert dropped.any()
    assert not dropped.all()
    for caption, is_dropped, tokens in zip(batch.caption, dropped, batch.tokens, strict=True):
        text = "" if is_dropped else caption
        length = model.conditioner.max_length
        expected = tokenizer(text, padding="max_length", max_length=length).input_ids
        assert tokens.tolist() == expected


def test_the_step_reads_no_captions(parts, batch):
    model = parts.module.model
    with torch.no_grad():
        losses = model.losses(batch).per_sample
        without_captions = replace(batch, caption=["x"] * len(batch.caption))
        assert torch.equal(model.losses(without_captions).per_sample, losses)
        without_tokens = replace(batch, tokens=None)
        assert torch.equal(model.losses(without_tokens).per_sample, losses)


def test_a_dropped_caption_has_the_context_of_the_empty_one(parts):
    conditioner = parts.module.model.conditioner
    labels = torch.zeros(1, dtype=torch.long)
    dropped = torch.ones(1, dtype=torch.bool)
    of_dropped = conditioner(Inputs(["a red star"], labels, dropped, latent_size=(8, 8)))
    of_empty = conditioner(Inputs([""], labels, ~dropped, latent_size=(8, 8)))
    of_caption = conditioner(Inputs(["a red star"], labels, ~dropped, latent_size=(8, 8)))
    assert torch.equal(of_dropped.context, of_empty.context)
    assert not torch.equal(of_dropped.context, of_caption.context)
