"""format=single_file: one safetensors file that diffusers and sdtrain draw with as with the run."""

import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionDepth2ImgPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from stable_diffusion import save_pipeline

from sdtrain.errors import UserError
from sdtrain.export.card import lost_lines
from sdtrain.export.single_file import original_state
from sdtrain.models.single_file import shipped_tokenizer

PROMPT = "a large red star on a blue background"


@pytest.fixture(scope="module")
def exported(tiny, here, tmp_path_factory):
    """A folder with the run of a zero-terminal v and, in half and full precision, its files."""
    folder = tmp_path_factory.mktemp("exported")
    pipeline = save_pipeline(folder / "pipeline")
    chosen = ["model=stable_diffusion", f"model.pretrained={pipeline}", "data.image_size=32"]
    short = ["trainer.max_images=16", "callbacks.samples.every=0", "validation.every=0"]
    words = ["modifiers=[zero_terminal_snr]", "prediction=v"]
    trained = here("sdtrain", *tiny(*chosen, *short, *words), f"hydra.run.dir={folder}/run")
    assert trained.code == 0, trained.err
    for dtype in ("fp32", "fp16"):
        output = [f"output={folder}/{dtype}", f"dtype={dtype}", "format=single_file"]
        result = here("sdtrain-export", f"checkpoint={folder}/run", *output)
        assert result.code == 0, result.err
        assert "schedule is not in the single file" in result.err
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def drawn_by_sdtrain(here, checkpoint: Path, output: Path) -> np.ndarray:
    """A picture [H, W, 3] of ddim on the trailing grid; its latents are beside it."""
    words = [f"prompt={PROMPT}", "num_images=1", "steps=50", "guidance.max_std=null"]
    words += ["grid=trailing", "save_latents=true", f"output={output}"]
    result = here("sdtrain-sample", f"checkpoint={checkpoint}", *words)
    assert result.code == 0, result.err
    return np.asarray(Image.open(output / "00000-seed0.png")).astype(int)


@pytest.mark.slow
def test_diffusers_and_sdtrain_draw_what_the_run_draws(exported, here, tmp_path):
    """To one level of colour."""
    file = exported / "fp32" / "model.safetensors"
    by_run = drawn_by_sdtrain(here, exported / "run", tmp_path / "run")
    by_file = drawn_by_sdtrain(here, file, tmp_path / "file")
    pipeline = StableDiffusionPipeline.from_single_file(
        str(file), config=str(exported / "fp32"), local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    latents = load_file(tmp_path / "run" / "latents.safetensors")["latents"]
    image = pipeline(PROMPT, latents=latents, num_inference_steps=50, guidance_scale=3.0).images[0]
    assert by_run.std() > 0
    assert np.abs(by_file - by_run).max() <= 1
    assert np.abs(np.asarray(image).astype(int) - by_run).max() <= 1


def test_files_have_the_mode_of_new_files(exported, here, tmp_path):
    """safetensors makes its own readable only to their owner."""
    new = tmp_path / "new"
    new.touch()
    folder = tmp_path / "folder"
    assert here("sdtrain-export", f"checkpoint={exported}/run", f"output={folder}").code == 0
    written = [path for path in [*exported.rglob("fp32/*"), *folder.rglob("*")] if path.is_file()]
    assert len(written) > 10
    for path in written:
        assert path.stat().st_mode == new.stat().st_mode, path


def test_half_precision_and_the_card(exported):
    whole = load_file(exported / "fp32" / "model.safetensors")
    half = load_file(exported / "fp16" / "model.safetensors")
    assert whole.keys() == half.keys()
    assert {value.dtype for value in half.values()} == {torch.float16}
    assert "from_single_file" in (exported / "fp32" / "README.md").read_text()
    assert not list(exported.glob("fp32/*/*.safetensors"))


KNOWN = {
    "schedule": {
        "_target_": "sdtrain.schedules.scaled_linear.scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
    },
    "prediction": {"_target_": "sdtrain.diffusion.prediction.Epsilon"},
    "sampler": {"_target_": "sdtrain.samplers.ddim.ddim"},
    "grid": {"_target_": "sdtrain.samplers.grids.trailing"},
}


@pytest.mark.parametrize(
    ("changed", "scale", "words", "told"),
    [
        ({}, 0.18215, {}, None),
        ({"modifiers": {"shift": {}}}, 0.18215, {}, "schedule"),
        ({"prediction": {"_target_": "sdtrain.diffusion.prediction.V"}}, 0.18215, {}, "predicts v"),
        ({}, 0.5, {}, "0.5"),
        ({}, 0.18215, {"cat</w>": 1}, "vocabulary"),
    ],
)
def test_what_readers_of_the_file_alone_do_not_know_is_told(changed, scale, words, told):
    vocabulary = json.loads((shipped_tokenizer() / "vocab.json").read_text(encoding="utf-8"))
    model = SimpleNamespace(
        objective=SimpleNamespace(schedule=None),
        autoencoder=SimpleNamespace(latent_scale=scale),
        conditioner=SimpleNamespace(
            tokenizer=SimpleNamespace(get_vocab=lambda: vocabulary | words)
        ),
    )
    lines = lost_lines(KNOWN | changed, model, single_file=True)
    assert len(lines) == (told is not None)
    assert all(told in line for line in lines)
    assert lost_lines(KNOWN | changed, model, single_file=False) == []


def test_a_network_that_the_layout_cannot_hold_is_refused(tiny_run, here, tmp_path):
    """The default network pools its context, for which the original layout has no name."""
    output = tmp_path / "out"
    words = [f"checkpoint={tiny_run}", f"output={output}", "format=single_file"]
    result = here("sdtrain-export", *words)
    assert result.code == 2
    assert "format=single_file" in result.paragraph
    assert "add_embedding" in result.paragraph
    assert not output.exists()


def test_a_model_with_depth_has_no_single_file():
    """diffusers' class for it reads none."""
    assert not hasattr(StableDiffusionDepth2ImgPipeline, "from_single_file")
    with pytest.raises(UserError) as caught:
        original_state(Mock(spec=StableDiffusionDepth2ImgPipeline))
    assert caught.value.key == "format"
