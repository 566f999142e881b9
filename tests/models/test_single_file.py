"""Single files in Stable Diffusion's original layout: read, written, and refused."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from safetensors.torch import load_file, save_file
from stable_diffusion import make_pipeline
from transformers import CLIPTokenizer

from sdtrain.config.compose import compose_config
from sdtrain.errors import UserError
from sdtrain.export.single_file import FILE, original_state, write_single_file
from sdtrain.models.hub import find_pipeline
from sdtrain.models.original_names import OPEN_CLIP_WIDTH, autoencoder_names, unet_names
from sdtrain.models.pipeline_folder import KEY, read_pipeline_folder
from sdtrain.models.single_file import CONFIGURATIONS, copy_configuration
from sdtrain.paths import shipped_folder

SHIPPED = shipped_folder("data", "README.md") / CONFIGURATIONS


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of converted files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sdtrain" / "converted"


def save_single_file(folder: Path, pipeline: StableDiffusionPipeline) -> Path:
    write_single_file(pipeline, original_state(pipeline), folder)
    return folder / FILE


@pytest.mark.parametrize("width", [16, OPEN_CLIP_WIDTH], ids=["CLIP", "OpenCLIP"])
def test_in_and_out_the_weights_are_the_same(width, tmp_path):
    pipeline = make_pipeline(width)
    file = save_single_file(tmp_path / "out", pipeline)
    folder = find_pipeline(str(file), None, None)
    read_pipeline_folder(folder, str(file), None)
    read = StableDiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    for part in ("unet", "vae", "text_encoder"):
        before = getattr(pipeline, part).state_dict()
        after = getattr(read, part).state_dict()
        assert before.keys() == after.keys()
        for name, value in before.items():
            assert torch.equal(value, after[name]), name
    again = original_state(read)
    for name, value in load_file(file).items():
        assert torch.equal(value, again[name]), name
    assert read.tokenizer.get_vocab() == pipeline.tokenizer.get_vocab()
    assert read.scheduler.config.beta_end == pipeline.scheduler.config.beta_end


def test_a_file_is_converted_once_and_anew_if_it_changes(tmp_path, cache):
    file = save_single_file(tmp_path / "out", make_pipeline())
    first = find_pipeline(str(file), None, None)
    written = (first / "model_index.json").stat().st_mtime_ns
    assert find_pipeline(str(file), None, None) == first
    assert (first / "model_index.json").stat().st_mtime_ns == written
    save_file({name: 2 * value for name, value in load_file(file).items()}, file)
    assert find_pipeline(str(file), None, None) != first
    assert len(list(cache.iterdir())) == 2  # and nothing half-written


def test_what_a_killed_conversion_left_is_removed(tmp_path, cache):
    """But not what another one is writing."""
    killed = cache / ".killed.tmp"
    running = cache / ".running.tmp"
    for scratch in (killed, running):
        scratch.mkdir(parents=True)
    os.utime(killed, (0, 0))
    find_pipeline(str(save_single_file(tmp_path / "out", make_pipeline())), None, None)
    assert not killed.exists()
    assert running.exists()


def shipped(kind: type, folder: str) -> torch.nn.Module:
    """A network of a shipped configuration."""
    return kind.from_config(kind.load_config(SHIPPED / folder))


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_original_names_are_those_that_diffusers_reads(version):
    """At full size, without memory: diffusers finds every weight of its own under our names."""
    with torch.device("meta"):
        networks = [
            shipped(UNet2DConditionModel, f"{version}/unet"),
            shipped(AutoencoderKL, f"{version}/vae"),
        ]
    readers = [
        (unet_names, convert_ldm_unet_checkpoint),
        (autoencoder_names, convert_ldm_vae_checkpoint),
    ]
    for network, (names_of, convert) in zip(networks, readers, strict=True):
        state = network.state_dict()
        names = names_of(state, network.config)
        assert len(set(names.values())) == len(state)
        renamed = {names[name]: value for name, value in state.items()}
        converted = convert(renamed, network.config)
        assert {name: value.shape for name, value in converted.items()} == {
            name: value.shape for name, value in state.items()
        }


def test_the_shipped_configurations_are_stable_diffusions():
    """Numbers of weights: 1.5 and 2.1 as published."""
    counts = {}
    for folder in ("v1/unet", "v2/unet", "small/unet", "v1/vae"):
        kind = AutoencoderKL if folder.endswith("vae") else UNet2DConditionModel
        with torch.device("meta"):
            network = shipped(kind, folder)
        counts[folder] = sum(parameter.numel() for parameter in network.parameters())
    assert counts["v1/unet"] == 859_520_964
    assert counts["v2/unet"] == 865_910_724
    assert counts["v1/vae"] == 83_653_863
    assert 75e6 < counts["small/unet"] < 85e6


@pytest.mark.parametrize(
    ("model", "prediction", "side"), [("sd15", "Epsilon", 64), ("sd21", "V", 96)]
)
def test_an_architecture_is_chosen_by_name(model, prediction, side):
    config = compose_config("train", [f"model={model}"])
    assert config["prediction"]["_target_"].endswith(f".{prediction}")
    assert config["schedule"]["_target_"].endswith(".scaled_linear")
    assert config["data"]["image_size"] == side * config["model"]["autoencoder"]["downsampling"]
    assert config["model"]["train"] == ["unet", "text_encoder"]
    assert config["model"]["unet"]["weights"] is None


def test_an_architecture_brings_its_own_tokenizer(tmp_path):
    architecture = tmp_path / "architecture"
    make_pipeline().save_pretrained(architecture)
    words = ["model=small", f"model.architecture={architecture}", "data.image_size=32"]
    conditioner = compose_config("train", words)["model"]["conditioner"]
    assert conditioner["tokenizer"] == str(architecture / "tokenizer")
    assert conditioner["architecture"] == str(architecture / "text_encoder")


@pytest.mark.parametrize("model", ["small", "sd15", "stable_diffusion"])
def test_an_architecture_takes_the_frozen_parts_of_a_pipeline(model, tmp_path):
    """And its own UNet and size of pictures."""
    pipeline = tmp_path / "pipeline"
    make_pipeline().save_pretrained(pipeline)
    architecture = Path(shutil.copytree(pipeline, tmp_path / "architecture"))
    file = architecture / "unet/config.json"
    side = json.loads(file.read_text())["sample_size"]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sample_size": 2 * side}))
    words = [f"model={model}", f"model.pretrained={pipeline}", f"model.architecture={architecture}"]
    config = compose_config("train", words)
    model = config["model"]
    assert model["unet"]["architecture"] == str(architecture / "unet")
    assert config["data"]["image_size"] == 2 * side * model["autoencoder"]["downsampling"]
    assert model["unet"]["weights"] is None
    assert model["conditioner"]["weights"] == str(pipeline / "text_encoder")
    assert model["autoencoder"]["path"] == str(pipeline / "vae")
    assert model["train"] == ["unet"]


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["model.train=[unet]"], "model.train"),
        (["model.architecture=nowhere"], "model.architecture"),
        (["model.architecture=data/tokenizer"], "model.architecture"),
        (["model.architecture=null"], "model.pretrained"),
    ],
)
def test_a_wrong_architecture_is_refused(words, key):
    with pytest.raises(UserError) as caught:
        compose_config("train", ["model=small", *words])
    assert caught.value.key == key


def test_widths_that_disagree_are_refused(tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="width 16.*width 768") as caught:
        compose_config("train", ["model=sd15", f"model.pretrained={tmp_path}"])
    assert caught.value.key == KEY


def renamed(part: str, other: str):
    def spoil(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name.replace(part, other): value for name, value in state.items()}

    return spoil


def without(part: str):
    def spoil(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value for name, value in state.items() if part not in name}

    return spoil


def for_inpainting(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return state | {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(16, 9, 3, 3)}


WRONG = {
    "SDXL": (renamed("cond_stage_model", "conditioner.embedders.0"), "Stable Diffusion XL"),
    "SD 3": (renamed("middle_block", "joint_blocks"), "Stable Diffusion 3"),
    "LoRA": (renamed("middle_block", "lora_unet"), "LoRA"),
    "no autoencoder": (without("first_stage_model"), "autoencoder"),
    "no text encoder": (without("cond_stage_model"), "text encoder"),
    "inpainting": (for_inpainting, "9 input channels"),
    "another UNet": (
        lambda state: state | {"model.diffusion_model.label_emb.0.0.weight": torch.zeros(1)},
        "label_emb",
    ),
    "one weight": (without("middle_block.0.in_layers.0.weight"), "middle_block.0.in_layers.0"),
    "one of the text": (without("final_layer_norm.bias"), "final_layer_norm.bias"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_file_is_named(case, tmp_path, cache):
    spoil, word = WRONG[case]
    file = save_single_file(tmp_path / "out", make_pipeline())
    save_file(spoil(load_file(file)), file)
    with pytest.raises(UserError, match=word) as caught:
        find_pipeline(str(file), None, None)
    assert caught.value.key == KEY
    assert not cache.exists() or not list(cache.iterdir())


def test_a_file_that_is_no_whole_safetensors_is_refused(tmp_path):
    file = save_single_file(tmp_path / "out", make_pipeline())
    content = file.read_bytes()
    for broken in (content[:-1], content[:4], b"\x00" * 64, b"x" * 64):
        file.write_bytes(broken)
        with pytest.raises(UserError) as caught:
            find_pipeline(str(file), None, None)
        assert caught.value.key == KEY
    pickle = file.rename(file.with_suffix(".ckpt"))
    with pytest.raises(UserError, match="pickle"):
        find_pipeline(str(pickle), None, None)


def test_a_width_without_a_configuration_is_refused(tmp_path):
    file = save_single_file(tmp_path / "out", make_pipeline())
    (file.parent / "model_index.json").unlink()
    with pytest.raises(UserError, match="16") as caught:
        find_pipeline(str(file), None, None)
    assert caught.value.key == KEY


@pytest.mark.parametrize("option", ["revision", "variant"])
def test_options_of_folders_have_no_effect_on_a_file(option, tmp_path):
    file = save_single_file(tmp_path / "out", make_pipeline())
    options = {"revision": None, "variant": None, option: "fp16"}
    with pytest.raises(UserError) as caught:
        find_pipeline(str(file), **options)
    assert caught.value.key == f"model.{option}"


def test_captions_are_padded_as_the_version_does(tmp_path):
    """With the end of the text in 1.x, with ! in 2.x, which is token 0."""
    for version, padding in (("v1", 49407), ("v2", 0)):
        copy_configuration(SHIPPED / version, tmp_path / version)
        tokenizer = CLIPTokenizer.from_pretrained(tmp_path / version / "tokenizer")
        tokens = tokenizer("a photo of a cat", padding="max_length").input_ids
        assert tokens == [49406, 320, 1125, 539, 320, 2368, 49407] + [padding] * 70


def test_a_touched_or_copied_file_is_the_same_pipeline(tmp_path, cache):
    """By its content, so that a run is resumed with it."""
    file = save_single_file(tmp_path / "out", make_pipeline())
    first = find_pipeline(str(file), None, None)
    file.touch()
    assert find_pipeline(str(file), None, None) == first
    copied = shutil.copytree(file.parent, tmp_path / "copied") / FILE
    assert find_pipeline(str(copied), None, None) == first
    assert len(list(cache.iterdir())) == 1


def test_a_damaged_conversion_is_made_anew(tmp_path):
    file = save_single_file(tmp_path / "out", make_pipeline())
    folder = find_pipeline(str(file), None, None)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    for damage in (weights.unlink, (folder / "model_index.json").unlink):
        damage()
        assert find_pipeline(str(file), None, None) == folder
        assert weights.read_bytes() == content


def test_a_configuration_without_tokenizer_gets_clips(tmp_path):
    """And nothing but configuration files is copied."""
    pipeline = make_pipeline(OPEN_CLIP_WIDTH)
    file = save_single_file(tmp_path / "out", pipeline)
    shutil.rmtree(file.parent / "tokenizer")
    (file.parent / "unet" / "other.bin").write_bytes(b"0")
    target = tmp_path / "copied"
    copy_configuration(file.parent, target)
    tokenizer = CLIPTokenizer.from_pretrained(target / "tokenizer")
    assert tokenizer.pad_token == "!"
    assert not (target / "unet" / "other.bin").exists()
    (file.parent / "vae" / "config.json").unlink()
    with pytest.raises(UserError, match="vae/config.json") as caught:
        find_pipeline(str(file), None, None)
    assert caught.value.key == KEY


@pytest.mark.parametrize("header", ["[]", "3", '{"a":{}}', '{"a":{"data_offsets":[0,1]}}'])
def test_a_header_of_another_kind_is_refused(header, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + b"0")
    with pytest.raises(UserError) as caught:
        find_pipeline(str(file), None, None)
    assert caught.value.key == KEY


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("model.unet.weights=data/tokenizer", "model.unet.weights"),
        ("model.revision=main", "model.revision"),
        ("model.variant=fp16", "model.variant"),
    ],
)
def test_options_without_effect_on_an_architecture_are_refused(word, key):
    with pytest.raises(UserError) as caught:
        compose_config("train", ["model=small", word])
    assert caught.value.key == key
