"""Which folders are taken for a Stable Diffusion pipeline, and what is wrong with the others."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file
from stable_diffusion import fill_hub_cache, save_pipeline

from sdtrain.errors import UserError
from sdtrain.models import hub
from sdtrain.models.hub import find_pipeline
from sdtrain.models.pipeline_folder import KEY, is_pipeline, read_pipeline_folder
from sdtrain.paths import find_folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("pretrained") / "pipeline")


@pytest.fixture
def pipeline(saved, tmp_path):
    """A copy that a test may change."""
    return Path(shutil.copytree(saved, tmp_path / "pipeline"))


def change(file: Path, **values) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | values))


def as_pickle(pipeline: Path) -> None:
    file = pipeline / "unet/diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), pipeline / "unet/diffusion_pytorch_model.bin")
    file.unlink()


def half_downloaded(pipeline: Path) -> None:
    file = pipeline / "unet/diffusion_pytorch_model.safetensors"
    first = "diffusion_pytorch_model-00001-of-00002.safetensors"
    second = "diffusion_pytorch_model-00002-of-00002.safetensors"
    file.rename(file.with_name(first))
    listed = {"weight_map": {"a": first, "b": second}}
    file.with_name(f"{file.name}.index.json").write_text(json.dumps(listed))


def truncated(pipeline: Path) -> None:
    file = pipeline / "unet/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


WRONG = {
    "truncated": (truncated, ["diffusion_pytorch_model.safetensors", "download"]),
    "no pipeline": (lambda p: (p / "model_index.json").unlink(), ["model_index.json"]),
    "SDXL": (
        lambda p: change(p / "model_index.json", _class_name="StableDiffusionXLPipeline"),
        ["StableDiffusionXLPipeline", "second text encoder"],
    ),
    "Flux": (
        lambda p: change(p / "model_index.json", _class_name="FluxPipeline"),
        ["FluxPipeline", "transformer"],
    ),
    "no text encoder": (lambda p: shutil.rmtree(p / "text_encoder"), ["text_encoder/"]),
    "no tokenizer": (lambda p: shutil.rmtree(p / "tokenizer"), ["tokenizer/"]),
    "pickle": (as_pickle, ["diffusion_pytorch_model.bin", "pickle"]),
    "half downloaded": (half_downloaded, ["index", "download"]),
    "width of the text": (
        lambda p: change(p / "unet/config.json", cross_attention_dim=24),
        ["16", "24", "hidden_size", "cross_attention_dim"],
    ),
    "input channels": (
        lambda p: change(p / "unet/config.json", in_channels=7),
        ["in_channels=7", "latent_channels=4"],
    ),
    "other UNet": (
        lambda p: change(p / "unet/config.json", _class_name="UNet2DModel"),
        ["UNet2DModel", "UNet2DConditionModel"],
    ),
    "empty tokenizer": (
        lambda p: (p / "tokenizer/tokenizer.json").unlink(),
        ["tokenizer/tokenizer.json"],
    ),
    "no number": (
        lambda p: change(p / "text_encoder/config.json", max_position_embeddings="x"),
        ["max_position_embeddings='x'"],
    ),
    "broken json": (lambda p: (p / "unet/config.json").write_text("{"), ["unet/config.json"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_folder_is_named(pipeline, case):
    spoil, words = WRONG[case]
    spoil(pipeline)
    with pytest.raises(UserError) as caught:
        read_pipeline_folder(pipeline, "SOURCE", None)
    assert caught.value.key == KEY
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_variant_is_wanted_of_every_part(pipeline):
    with pytest.raises(UserError, match="fp16"):
        read_pipeline_folder(pipeline, "SOURCE", "fp16")
    for file in pipeline.rglob("*.safetensors"):
        file.rename(file.with_name(f"{file.stem}.fp16.safetensors"))
    folder = read_pipeline_folder(pipeline, "SOURCE", "fp16")
    assert folder.autoencoder.weights.variant == "fp16"
    assert read_pipeline_folder(pipeline, "SOURCE", None).unet["sample_size"] == 8
    with pytest.raises(UserError, match="bf16"):
        read_pipeline_folder(pipeline, "SOURCE", "bf16")


@pytest.fixture
def cache(saved, tmp_path, monkeypatch):
    """The hub's cache with OWNER/NAME in two revisions, of which `old` is older."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return fill_hub_cache(tmp_path / "cache", {"main": saved, "old": saved})


def test_a_repository_of_the_hub_is_read_from_its_cache_at_a_revision(cache):
    assert find_pipeline("OWNER/NAME", None, None) == cache / "main"
    assert find_pipeline("OWNER/NAME", "old", None) == cache / "old"


def test_a_copy_that_lacks_files_is_completed(cache, saved, monkeypatch):
    """Of another variant, or of a download that was interrupted."""
    weights = cache / "main/unet/diffusion_pytorch_model.safetensors"
    weights.unlink()
    asked = []

    def snapshot_download(source, *, revision, allow_patterns, local_files_only):
        asked.append((local_files_only, len(allow_patterns) == 1))
        if not local_files_only and len(allow_patterns) > 1:
            shutil.copy(saved / "unet" / weights.name, weights)
        return str(cache / "main")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert find_pipeline("OWNER/NAME", None, None) == cache / "main"
    assert asked == [(True, False), (False, True), (False, False)]  # the index first
    assert weights.is_file()
    assert find_pipeline("OWNER/NAME", None, None) == cache / "main"
    assert len(asked) == 4  # it is complete


def test_another_model_on_the_hub_is_refused_before_its_weights(cache, monkeypatch):
    index = cache / "main/model_index.json"
    index.write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    asked = []

    def snapshot_download(source, *, revision, allow_patterns, local_files_only):
        asked.append(len(allow_patterns))
        if local_files_only:
            raise LocalEntryNotFoundError("nothing in the cache")
        return str(cache / "main")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(UserError, match="StableDiffusionXL"):
        find_pipeline("OWNER/NAME", None, None)
    assert len(asked) == 2 and asked[-1] == 1


@pytest.mark.parametrize(
    ("source", "revision", "key"),
    [
        ("OWNER/OTHER", None, KEY),
        ("OWNER/NAME", "newer", KEY),
        ("no such folder", None, KEY),
        (".", "main", "model.revision"),
    ],
)
def test_a_source_that_cannot_be_had_is_refused(cache, monkeypatch, source, revision, key):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as caught:
        hub.find_pipeline(source, revision, None)
    assert caught.value.key == key


@pytest.mark.parametrize("name", ["missing.safetensors", "folder/missing.safetensors"])
def test_a_missing_file_is_not_searched_for_on_the_hub(name, monkeypatch):
    monkeypatch.setattr("sdtrain.models.hub._snapshot", None)  # would raise TypeError
    with pytest.raises(UserError) as caught:
        find_pipeline(name, None, None)
    assert caught.value.key == "model.pretrained" and caught.value.value == name


@pytest.mark.parametrize("name", ["data/shapes_text_to_image", "data/shapes_depth"])
def test_a_shipped_pipeline_is_found_from_everywhere(name, tmp_path, monkeypatch):
    """Unless there is a folder of that name, which may be another project's."""
    monkeypatch.chdir(tmp_path)
    shipped = find_pipeline(name, None, None)
    assert shipped == find_folder(name, "")
    assert is_pipeline(shipped)
    (tmp_path / name).mkdir(parents=True)
    assert find_pipeline(name, None, None) == tmp_path / name
    with pytest.raises(UserError):
        find_pipeline("data/no_such_model.safetensors", None, None)
