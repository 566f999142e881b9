"""Files of LoRAs: written, read and added to a model, alone and several together."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from untrained import make

from sdtrain.adapters.interface import networks_of
from sdtrain.adapters.lora import Lora, add_lora
from sdtrain.adapters.lora_file import FILE, read_lora, write_lora
from sdtrain.errors import UserError

LAYOUTS = ["diffusers", "kohya"]


def outputs(model):
    """The UNet's output, and the context of a caption."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 8, 8, generator=generator)
    tokens = model.conditioner.tokenize(["a red star", "a blue ring"])
    context = model.conditioner.net(input_ids=tokens).last_hidden_state
    return torch.cat(
        [model.unet(x, torch.tensor([3.0, 900.0]), context).flatten(), context.flatten()]
    )


def with_lora(**options):
    """A model with a LoRA whose weights are random."""
    model = make("text")
    model.attach(Lora(**{"rank": 2, "alpha": 3, "text_encoder": True} | options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.trained_parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def add(model, path, weight=1.0, name="added"):
    networks = networks_of(model)
    add_lora(networks, read_lora(str(path), "lora", networks), name, weight)
    return model


@torch.no_grad()
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_read_computes_what_was_written(layout, dora, tmp_path):
    trained = with_lora(dora=dora, text_encoder=not dora)
    write_lora(networks_of(trained), tmp_path, layout)
    read = add(make("text").eval(), tmp_path)
    assert torch.equal(outputs(read), outputs(trained))
    assert not torch.equal(outputs(make("text").eval()), outputs(trained))


@torch.no_grad()
def test_weights_scale_updates_and_several_add_up(tmp_path):
    write_lora(networks_of(with_lora()), tmp_path, "diffusers")
    whole = outputs(add(make("text").eval(), tmp_path))
    assert torch.equal(outputs(add(make("text").eval(), tmp_path, 0.0)), outputs(make("text")))
    two = add(make("text").eval(), tmp_path, 0.25)
    add(two, tmp_path, 0.75, "second")
    torch.testing.assert_close(outputs(two), whole, rtol=0, atol=1e-5)
    beside = add(with_lora(), tmp_path, -1.0)
    torch.testing.assert_close(outputs(beside), outputs(make("text")), rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_says_its_alpha_and_the_layers_of_the_original_text_encoder(layout, tmp_path):
    write_lora(networks_of(with_lora()), tmp_path, layout)
    (tmp_path / "other").touch()
    assert (tmp_path / FILE).stat().st_mode == (tmp_path / "other").stat().st_mode
    state = load_file(tmp_path / FILE)
    if layout == "kohya":
        assert {value.item() for name, value in state.items() if name.endswith(".alpha")} == {3}
        starts = ("lora_unet_", "lora_te_text_model_encoder_layers_0_")
    else:
        starts = ("unet.", "text_encoder.text_model.encoder.layers.0.")
    assert all(name.startswith(starts) for name in state)


def test_a_file_of_another_model_is_refused(tmp_path):
    with pytest.raises(UserError) as caught:
        write_lora(networks_of(make("text")), tmp_path / "none", "kohya")
    assert caught.value.key == "format"
    assert not (tmp_path / "none").exists()
    write_lora(networks_of(with_lora()), tmp_path, "diffusers")
    state = load_file(tmp_path / FILE)
    key = next(name for name in state if name.endswith("to_k.lora_A.weight"))
    cases = {
        "other width": state | {key: torch.zeros(2, 7)},
        "other layer": {name.replace("to_q", "to_z"): value for name, value in state.items()},
        "half a layer": {key: state[key]},
        "none": {"weight": torch.zeros(2, 2)},
        "two ranks": state | {key: torch.zeros(3, state[key].shape[1])},
        "a convolution": state | {key: state[key][..., None, None]},
        "not finite": state | {key: state[key] * torch.nan},
        "two layouts": {key: state[key], "lora_unet_mid_block.alpha": torch.tensor(1.0)},
        "no LoRA": {"unet.conv_in.weight": torch.zeros(2, 2)},
    }
    for name, content in cases.items():
        path = tmp_path / f"{name}.safetensors"
        save_file(content, path)
        with pytest.raises(UserError) as caught:
            read_lora(str(path), "lora", networks_of(make("text")))
        assert caught.value.key == "lora", name
    (tmp_path / "text.safetensors").write_text("no tensors")
    magnitude = key.replace("lora_A.weight", "lora_magnitude_vector")
    save_file(state | {magnitude: torch.ones(1, 8)}, tmp_path / "of inputs.safetensors")
    save_file(state, tmp_path / "a list.safetensors", {"lora_adapter_metadata": "[1]"})
    for name in ("text.safetensors", "missing", "of inputs.safetensors", "a list.safetensors"):
        path = tmp_path / name
        with pytest.raises(UserError) as caught:
            read_lora(str(path), "lora", networks_of(make("text")))
        assert caught.value.key == "lora"


@torch.no_grad()
def test_the_metadata_of_peft_say_the_scale(tmp_path):
    """alpha / rank, or alpha / sqrt(rank); a pattern is the end of a layer's name."""
    write_lora(networks_of(with_lora(text_encoder=False)), tmp_path, "diffusers")
    state = load_file(tmp_path / FILE)
    found = {}
    for name, more in (
        ("plain", {}),
        ("rslora", {"unet.use_rslora": True}),
        ("pattern", {"unet.alpha_pattern": {"attn1.to_q": 8}}),
    ):
        metadata = {"unet.lora_alpha": 3, "unet.r": 2} | more
        path = tmp_path / f"{name}.safetensors"
        save_file(state, path, {"lora_adapter_metadata": json.dumps(metadata)})
        read = read_lora(str(path), "lora", networks_of(make("text")))["unet"]
        found[name] = {layer: update.alpha for layer, update in read.items()}
    assert set(found["plain"].values()) == {3}
    for alpha in found["rslora"].values():
        assert alpha == pytest.approx(3 * 2**0.5)
    for layer, alpha in found["pattern"].items():
        assert alpha == (8 if layer.endswith("attn1.to_q") else 3)
    layer = next(iter(found["plain"]))
    beside = tmp_path / "beside.safetensors"
    save_file(state | {f"unet.{layer}.alpha": torch.tensor(5.0)}, beside)
    read = read_lora(str(beside), "lora", networks_of(make("text")))
    assert read["unet"][layer].alpha == 5
