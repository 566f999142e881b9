"""Where the network looks for each word: the shares of its cross-attention, and words of tokens."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from untrained import SIZE, drawing, make

from sdtrain.errors import UserError
from sdtrain.generation.attention_maps import (
    attention_sheet,
    check_attention,
    cross_attentions,
    draw_with_attention,
    recorded_attention,
    word_maps,
)
from sdtrain.generation.drawing import Request
from sdtrain.generation.generate import generate

PROMPTS = ["a red circle", "the-blue star, on white"]


@pytest.fixture(scope="module")
def model():
    return make("text")


@pytest.fixture
def requests():
    return [Request(seed, prompt=prompt) for seed, prompt in enumerate(PROMPTS)]


def test_the_pictures_are_those_without_maps(model, requests):
    for settings in (drawing(), replace(drawing(), batch_size=1)):
        images, maps = draw_with_attention(model, requests, settings, SIZE)
        assert torch.equal(images, generate(model, requests, settings, SIZE))
        words = [[each.word for each in words] for words in maps]
        assert words == [["a", "red", "circle"], ["the-blue", "star", "on", "white"]]
        for each in (each for words in maps for each in words):
            assert each.attention.shape == (SIZE, SIZE)
            assert each.attention.isfinite().all() and each.attention.std() > 0


def test_a_layer_gives_the_shares_of_its_own_attention(model):
    """By hand, from the layer's weights."""
    layer = cross_attentions(model.unet)[0]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 16, layer.to_q.in_features, generator=generator)
    context = torch.randn(2, 5, layer.to_k.in_features, generator=generator)
    with torch.no_grad(), recorded_attention(model.unet, (4, 4)) as recorded:
        output = layer(hidden, encoder_hidden_states=context)
    with torch.no_grad():
        assert torch.equal(output, layer(hidden, encoder_hidden_states=context))
    query, key = (
        each.unflatten(-1, (layer.heads, -1)) for each in (layer.to_q(hidden), layer.to_k(context))
    )
    scores = torch.einsum("bphc,blhc->bhpl", query, key) / query.shape[-1] ** 0.5
    probabilities = scores.softmax(-1)
    spread, mean = torch.std_mean(probabilities, dim=2, correction=0, keepdim=True)
    expected = ((probabilities - mean) / spread).mean(1).transpose(1, 2).unflatten(2, (4, 4))
    assert len(recorded) == 1  # and none after the block
    torch.testing.assert_close(recorded[0], expected, rtol=1e-3, atol=1e-3)


def test_coarser_layers_are_enlarged(model, requests):
    """All maps have the latents' size, also where a side is odd."""
    x = torch.zeros(1, 3, 6, 10)
    conditioning = torch.zeros(1, 7, model.conditioner.context_dim)
    with torch.no_grad(), recorded_attention(model.unet, (6, 10)) as recorded:
        model.unet(x, torch.zeros(1), conditioning)
    assert len(recorded) == len(cross_attentions(model.unet)) > 1
    assert {tuple(each.shape) for each in recorded} == {(1, 7, 6, 10)}


def test_a_word_of_several_tokens_has_their_mean(model):
    tokens = model.conditioner.tokenize.tokenizer("xylophone red").input_ids
    assert len(tokens) > 4
    attention = torch.arange(float(model.conditioner.max_length)).view(-1, 1, 1).expand(-1, 2, 2)
    found = word_maps(model, "xylophone red", attention, (2, 2))
    last = len(tokens) - 2
    means = [each.attention.mean().item() for each in found]
    assert means == [pytest.approx((1 + last - 1) / 2), pytest.approx(last)]


def test_words_that_are_cut_off_have_no_map(model):
    attention = torch.ones(model.conditioner.max_length, 2, 2)
    found = word_maps(model, "red " * 100, attention, (2, 2))
    assert 0 < len(found) < model.conditioner.max_length


def test_a_sheet_has_a_row_for_each_picture(model, requests):
    sheet = attention_sheet(*draw_with_attention(model, requests, drawing(), SIZE))
    single = attention_sheet(*draw_with_attention(model, requests[:1], drawing(), SIZE))
    assert sheet.height > single.height and sheet.width > single.width


def test_a_model_without_words_to_look_for_is_refused(model):
    check_attention(model, "attention", True)
    with pytest.raises(UserError):
        check_attention(make("class_label"), "attention", True)
    own = make("text")
    own.unet = torch.nn.Linear(1, 1)
    with pytest.raises(UserError):
        check_attention(own, "attention", True)


def test_the_command_writes_a_sheet(here, tiny_run, tmp_path):
    words = [
        f"checkpoint={tiny_run}",
        "prompt=a star",
        "num_images=1",
        "steps=2",
        "accelerator=cpu",
    ]
    result = here("sdtrain-sample", *words, "attention=true", f"output={tmp_path}/out")
    assert result.code == 0, result.err
    with Image.open(tmp_path / "out/attention.png") as sheet:
        height = sheet.height
    many = ["num_images=18", "attention=true", f"output={tmp_path}/out"]
    result = here("sdtrain-sample", *words, *many)
    assert result.code == 0, result.err
    assert "attention.png" in result.out
    with Image.open(tmp_path / "out/attention.png") as sheet:
        assert 14 * height < sheet.height < 17 * height  # the first 16
    picture = tmp_path / "picture.png"
    Image.new("RGB", (32, 32)).save(picture)
    nowhere = [f"init_image={picture}", "strength=0", f"output={tmp_path}/none"]
    result = here("sdtrain-sample", *words, "attention=true", *nowhere)
    assert result.code == 2 and "strength" in result.paragraph
    assert not (tmp_path / "none").exists()


def test_a_run_writes_a_sheet_beside_its_grid(train_tiny, tmp_path):
    result = train_tiny(tmp_path / "run", "callbacks=attention", "trainer.max_images=32")
    assert result.code == 0, result.err
    assert [path.name for path in tmp_path.glob("run/samples/attention*")]
