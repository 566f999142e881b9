"""What a run has trained is loaded by diffusers alone and draws the same pictures."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from PIL import Image
from reading import BARE, newest, with_option, with_values
from safetensors.torch import load_file
from stable_diffusion import save_pipeline

from sdtrain.assemble.drawing import build_drawing
from sdtrain.assemble.load import load
from sdtrain.assemble.objective import build_objective
from sdtrain.config.run_readers import check_export
from sdtrain.errors import UserError
from sdtrain.export.card import lost_lines
from sdtrain.export.export import export as export_checkpoint
from sdtrain.export.scheduler import scheduler_of
from sdtrain.generation.drawing import Request, StartPicture
from sdtrain.generation.generate import generate, starting_latents
from sdtrain.pictures import read_notes
from sdtrain.randomness import KeyedRandom
from sdtrain.runs.layout import CheckpointFolder
from sdtrain.schedules.scaled_linear import scaled_linear

PROMPT = "a large red star on a blue background"
SHORT = [
    "trainer.max_images=16",
    "callbacks.samples.every=0",
    "validation.every=0",
    "data.size=16",
]
STEPS = 10


@pytest.fixture(scope="module")
def export(composed):
    """export(RUN, OUTPUT, "ema=false", ...) -> OUTPUT, to which the command's own calls have
    exported the run."""

    def exported(run: Path, output: Path, *words: str) -> Path:
        values = [f"checkpoint={run}", f"output={output}", *words]
        config = with_values(composed(config="export"), *values)
        export_checkpoint(check_export(config, values))
        return output

    return exported


def drawn_by_diffusers(folder: Path, latents: torch.Tensor) -> torch.Tensor:
    """Pictures [1, 3, H, W] in [0, 1], from these starting latents."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        PROMPT,
        latents=latents,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        output_type="np",
    ).images
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def drawn_by_sdtrain(composed, run: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """A picture of ddim on the trailing grid, without a bound on x0; and its starting latents."""
    loaded = load(CheckpointFolder(newest(run)), ema=True, device="cpu", allow=[])
    default = with_option(composed(config="sample"), "grid=trailing")
    settings = with_values(default, "guidance.max_std=null", f"steps={STEPS}")
    drawing = build_drawing(settings, loaded.model.objective.schedule)
    requests = [Request(3, prompt=PROMPT)]
    images = generate(loaded.model, requests, drawing, loaded.image_size)
    latents = starting_latents(loaded.model, requests, drawing, loaded.image_size)
    return images / 2 + 0.5, latents


@pytest.fixture(scope="module")
def exported(tiny_run, here, tmp_path_factory):
    """(what the command prints on stderr, the pipeline that it makes of the default run)."""
    output = tmp_path_factory.mktemp("exported") / "out"
    result = here("sdtrain-export", f"checkpoint={tiny_run}", f"output={output}")
    assert result.code == 0, result.err
    return result.err, output


def test_diffusers_draws_the_same_picture_as_the_default_run(tiny_run, exported, composed):
    ours, latents = drawn_by_sdtrain(composed, tiny_run)
    assert (drawn_by_diffusers(exported[1], latents) - ours).abs().max() < 1e-3


def test_the_card_lists_the_prompts_of_its_grid(tiny_run, exported):
    card = (exported[1] / "README.md").read_text()
    row = sorted(tiny_run.glob("samples/pictures-*.png"))[-1]
    with Image.open(row) as picture:
        requests = read_notes(picture)["requests"]
    assert requests
    for request in requests:
        assert f"{request['prompt']} (seed {request['seed']})" in card


PARITY = {
    "shifted v": ["modifiers=[shift]", "prediction=v"],
    "zero-terminal v": ["modifiers=[zero_terminal_snr]", "prediction=v"],
    "cosine v": ["schedule=cosine", "prediction=v"],
    "laplace v": ["schedule=laplace", "prediction=v"],
}
EVERY_DAY = "zero-terminal v"


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case == EVERY_DAY else pytest.mark.slow) for case in PARITY],
)
def test_diffusers_draws_the_same_picture(case, run_of, export, composed, tmp_path):
    run = run_of("run", *PARITY[case], *SHORT)
    folder = export(run, tmp_path / "out")
    ours, latents = drawn_by_sdtrain(composed, run)
    assert (drawn_by_diffusers(folder, latents) - ours).abs().max() < 1e-3


def test_layers_that_clip_skip_leaves_out_are_not_exported(
    finetuned, run_of, export, composed, tmp_path
):
    chosen = ["model=stable_diffusion", f"model.pretrained={finetuned}/pipeline"]
    words = ["data.image_size=32", "model.conditioner.clip_skip=1", *SHORT]
    run = run_of("run", *chosen, *words)
    folder = export(run, tmp_path / "out")
    text_encoder = json.loads((folder / "text_encoder/config.json").read_text())
    whole = json.loads((finetuned / "pipeline/text_encoder/config.json").read_text())
    assert text_encoder["num_hidden_layers"] == whole["num_hidden_layers"] - 1
    ours, latents = drawn_by_sdtrain(composed, run)
    assert (drawn_by_diffusers(folder, latents) - ours).abs().max() < 1e-3


def test_diffusers_makes_the_same_picture_of_a_picture(tiny_run, exported, composed, monkeypatch):
    """Image-to-image at strength 0.8, from the same latents and noise."""
    loaded = load(CheckpointFolder(newest(tiny_run)), ema=True, device="cpu", allow=[])
    default = with_option(composed(config="sample"), "grid=trailing")
    settings = with_values(default, "guidance.max_std=null", f"steps={STEPS}", "strength=0.8")
    drawing = build_drawing(settings, loaded.model.objective.schedule)
    rows = torch.linspace(-0.9, 0.9, loaded.image_size)
    across = rows.expand(loaded.image_size, -1)
    picture = torch.stack([across, across.T, torch.zeros_like(across)])
    requests = [Request(3, prompt=PROMPT, start=StartPicture(Path("ramp.png"), (32, 32), picture))]
    ours = generate(loaded.model, requests, drawing, loaded.image_size)
    latents = loaded.model.latents(picture[None])
    noise = torch.from_numpy(KeyedRandom(3, "image").normal(0, tuple(latents.shape[1:])))[None]
    module = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img"
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *args, **kwargs: noise)
    pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(exported[1], low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPT,
        image=latents,
        strength=0.8,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        output_type="np",
    ).images
    theirs = torch.from_numpy(theirs).permute(0, 3, 1, 2)
    assert (theirs - (ours / 2 + 0.5)).abs().max() < 1e-3
    from_noise = generate(loaded.model, [Request(3, prompt=PROMPT)], drawing, loaded.image_size)
    assert (from_noise - ours).abs().max() > 0.05


def test_diffusers_follows_a_depth_map_alike(run_of, export, composed, tmp_path, monkeypatch):
    """Depth-to-image at strength 0.8, from the same latents, noise and depth map."""
    run = run_of("run", "model/channels=[depth]", "optimizer.lr=0.01", *SHORT)
    folder = export(run, tmp_path / "out")
    loaded = load(CheckpointFolder(newest(run)), ema=True, device="cpu", allow=[])
    default = with_option(composed(config="sample"), "grid=trailing")
    settings = with_values(default, "guidance.max_std=null", f"steps={STEPS}", "strength=0.8")
    drawing = build_drawing(settings, loaded.model.objective.schedule)
    across = torch.linspace(-0.9, 0.9, loaded.image_size).expand(loaded.image_size, -1)
    picture = torch.stack([across, across.T, torch.zeros_like(across)])
    depth = (0.5 + 0.3 * across * across.T)[None]
    start = StartPicture(Path("ramp.png"), (32, 32), picture)
    ours = generate(
        loaded.model,
        [Request(3, prompt=PROMPT, depth=depth, start=start)],
        drawing,
        loaded.image_size,
    )
    shape = loaded.model.latents(picture[None]).shape
    noise = torch.from_numpy(KeyedRandom(3, "image").normal(0, tuple(shape[1:])))[None]
    module = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_depth2img"
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *args, **kwargs: noise)
    mean = "diffusers.models.autoencoders.vae.randn_tensor"  # no draw from the posterior
    monkeypatch.setattr(mean, lambda size, *args, **kwargs: torch.zeros(size))
    pipeline = StableDiffusionDepth2ImgPipeline.from_pretrained(
        folder, depth_estimator=None, feature_extractor=None, low_cpu_mem_usage=False
    )
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for depth_map in (depth, depth.flip(1)):
        theirs = pipeline(
            PROMPT,
            image=picture[None],
            depth_map=depth_map,
            strength=0.8,
            num_inference_steps=STEPS,
            guidance_scale=3.0,
            output_type="np",
        ).images
        images.append(torch.from_numpy(theirs).permute(0, 3, 1, 2))
    assert (images[0] - (ours / 2 + 0.5)).abs().max() < 1e-3
    assert (images[1] - images[0]).abs().max() > 0.01  # the depth map is read


def test_diffusers_inpaints_alike(run_of, export, composed, tmp_path, monkeypatch):
    """A model with nine input channels, from the same noise, picture and mask."""
    run = run_of("run", "model/channels=[inpainting]", "optimizer.lr=0.01", *SHORT)
    folder = export(run, tmp_path / "out")
    loaded = load(CheckpointFolder(newest(run)), ema=True, device="cpu", allow=[])
    default = with_option(composed(config="sample"), "grid=trailing")
    settings = with_values(default, "guidance.max_std=null", f"steps={STEPS}", "strength=1.0")
    drawing = build_drawing(settings, loaded.model.objective.schedule)
    side = loaded.image_size
    across = torch.linspace(-0.9, 0.9, side).expand(side, -1)
    picture = torch.stack([across, across.T, torch.zeros_like(across)])
    mask = torch.zeros(1, side, side, dtype=torch.bool)
    mask[:, 4:20, 8:] = True
    start = StartPicture(Path("ramp.png"), (32, 32), picture, mask)
    requests = [Request(3, prompt=PROMPT, start=start)]
    ours = generate(loaded.model, requests, drawing, side)
    noise = starting_latents(loaded.model, requests, drawing, side)
    mean = "diffusers.models.autoencoders.vae.randn_tensor"  # no draw from the posterior
    monkeypatch.setattr(mean, lambda size, *args, **kwargs: torch.zeros(size))
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for mask_image in (mask, mask.flip(1)):
        theirs = pipeline(
            PROMPT,
            image=picture[None],
            mask_image=mask_image[None].float(),
            latents=noise,
            height=side,
            width=side,
            strength=1.0,
            num_inference_steps=STEPS,
            guidance_scale=3.0,
            output_type="np",
        ).images
        images.append(torch.from_numpy(theirs).permute(0, 3, 1, 2))
    assert (images[0] - (ours / 2 + 0.5)).abs().max() < 1e-3
    assert (images[1] - images[0]).abs().max() > 0.01  # the mask is read


@pytest.mark.parametrize(
    ("sampler", "grid", "told"),
    [
        ("ddim.ddim", "grids.trailing", []),
        ("ddim.ddim", "grids.default", []),
        ("ddim.ddim", "grids.uniform_log_snr", ["uniform_log_snr"]),
        ("heun.heun", "grids.trailing", ["heun"]),
    ],
)
def test_another_sampler_or_grid_of_the_run_is_told(sampler, grid, told):
    saved = {
        "schedule": {},
        "sampler": {"_target_": f"sdtrain.samplers.{sampler}"},
        "grid": {"_target_": f"sdtrain.samplers.{grid}"},
    }
    schedule = scaled_linear(num_timesteps=1000, beta_start=0.00085, beta_end=0.012)
    model = SimpleNamespace(objective=SimpleNamespace(schedule=schedule))
    lines = lost_lines(saved, model, single_file=False)
    assert len(lines) == len(told)
    assert all(word in line for word, line in zip(told, lines, strict=True))


@pytest.mark.slow
def test_flow_is_drawn_to_a_hundredth(run_of, export, composed, tmp_path):
    run = run_of("run", "schedule=flow", "prediction=flow", *SHORT)
    folder = export(run, tmp_path / "out")
    ours, latents = drawn_by_sdtrain(composed, run)
    assert (drawn_by_diffusers(folder, latents) - ours).abs().max() < 1e-2


@pytest.fixture(scope="module")
def finetuned(train_tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetuned")
    pipeline = save_pipeline(folder / "pipeline")
    chosen = ["model=stable_diffusion", f"model.pretrained={pipeline}", "data.image_size=32"]
    assert train_tiny(folder / "run", *chosen, *SHORT).code == 0
    return folder


@pytest.fixture(scope="module")
def raw(finetuned, export):
    """The pipeline of its weights that are not averaged. Not to be changed."""
    return export(finetuned / "run", finetuned / "raw", "ema=false")


@pytest.fixture(scope="module")
def averaged(finetuned, export):
    """The pipeline of its averaged weights. Not to be changed."""
    return export(finetuned / "run", finetuned / "averaged")


def weights_of(pipeline: Path, subfolder: str) -> dict[str, torch.Tensor]:
    (file,) = (pipeline / subfolder).glob("*.safetensors")
    return load_file(file)


def test_out_and_in_and_out_again_the_weights_are_the_same(raw, run_of, export, tmp_path):
    chosen = ["model=stable_diffusion", f"model.pretrained={raw}", "optimizer.lr=0"]
    run = run_of("run", *chosen, *SHORT, "trainer.max_images=8")
    second = export(run, tmp_path / "second")
    for subfolder in ("unet", "text_encoder", "vae"):
        before = weights_of(raw, subfolder)
        after = weights_of(second, subfolder)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    for name in ("unet", "text_encoder", "vae"):
        assert public_config(raw / name) == public_config(second / name)


def public_config(folder: Path) -> dict:
    """config.json without the keys of diffusers' own, such as its version and the folder's name."""
    config = json.loads((folder / "config.json").read_text())
    return {key: value for key, value in config.items() if not key.startswith("_")}


def test_only_what_was_trained_has_changed(finetuned, raw):
    for subfolder in ("text_encoder", "vae"):
        before = weights_of(finetuned / "pipeline", subfolder)
        after = weights_of(raw, subfolder)
        prefix = "text_model." if subfolder == "text_encoder" else ""
        for name, value in before.items():
            name = name if name.startswith(prefix) else f"{prefix}{name}"
            assert torch.equal(after[name].float(), value.float()), name
    saved = load_file(newest(finetuned / "run") / "model.safetensors")
    unet = weights_of(raw, "unet")
    assert all(torch.equal(saved[f"unet.net.{name}"], value) for name, value in unet.items())


def test_frozen_weights_go_out_in_full_precision(finetuned, run_of, export, tmp_path):
    """Whatever they were trained with."""
    chosen = ["model=stable_diffusion", f"model.pretrained={finetuned}/pipeline"]
    keys = ("model.frozen_dtype", "model.conditioner.dtype", "model.autoencoder.dtype")
    halved = [f"{key}=bf16" for key in keys]  # as Hydra fills them in
    few = ["data.image_size=32", "data.size=8", "trainer.max_images=8"]
    run = run_of("run", *chosen, *BARE, *few, *halved)
    folder = export(run, tmp_path / "out", "ema=false")
    before = weights_of(finetuned / "pipeline", "text_encoder")
    after = weights_of(folder, "text_encoder")
    for name, value in before.items():
        assert torch.equal(after[f"text_model.{name.removeprefix('text_model.')}"], value), name


def test_averaged_weights_half_precision_and_the_card(finetuned, averaged, export, tmp_path):
    half = export(finetuned / "run", tmp_path / "half", "dtype=fp16")
    ema = load_file(newest(finetuned / "run") / "ema.safetensors")
    name = "conv_in.weight"
    assert torch.equal(weights_of(averaged, "unet")[name], ema[f"unet.net.{name}"])
    assert weights_of(half, "unet")[name].dtype == torch.float16
    card = (averaged / "README.md").read_text()
    assert str(finetuned) not in card
    assert str(finetuned) not in (averaged / "vae/config.json").read_text()
    for text in ("StableDiffusionPipeline", "averaged", "scaled_linear", "Licence"):
        assert text in card, text


@pytest.mark.slow
def test_a_pipeline_without_sdtrain_draws(averaged, tmp_path):
    """And reads no file of sdtrain's."""
    code = (
        "import sys; sys.modules['sdtrain'] = None\n"
        "from diffusers import StableDiffusionPipeline\n"
        f"pipeline = StableDiffusionPipeline.from_pretrained({str(averaged)!r})\n"
        "image = pipeline('a red star', num_inference_steps=2).images[0]\n"
        "assert image.size == (32, 32)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True)


REFUSED = {
    "x0": ["prediction=x0"],
    "edm": ["schedule=edm", "prediction=edm"],
    "epsilon without signal": ["schedule=cosine"],
    "shifted flow": ["schedule=flow", "modifiers=[shift]", "prediction=flow"],
    "v on the straight path": ["schedule=flow", "prediction=v"],
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_scheduler_expresses_is_refused_by_name(case, composed):
    objective = build_objective(composed("weighting=simple", *REFUSED[case]))
    with pytest.raises(UserError) as caught:
        scheduler_of(objective.schedule, objective.prediction)
    assert caught.value.key == "checkpoint"


def test_what_is_lost_is_told(exported):
    printed, folder = exported
    assert "guidance.max_std" in printed
    assert "guidance.max_std" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["output=FULL"], "output"),
        (["output=new", "checkpoint=nowhere"], "checkpoint"),
        (["output=new", "dtype=fp8"], "dtype"),
    ],
)
def test_a_mistake_is_refused_and_nothing_is_written(words, key, tiny_run, here, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    typed = [word.replace("FULL", str(full)).replace("new", f"{tmp_path}/new") for word in words]
    result = here("sdtrain-export", f"checkpoint={tiny_run}", *typed)
    assert result.code == 2
    assert key in result.paragraph
    assert not (tmp_path / "new").exists()
    assert [path.name for path in full.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("word", "said"),
    [("data.image_size=36", "data.image_size"), ("model/conditioner=class_label", "ClassLabel")],
)
def test_a_model_that_no_pipeline_holds_is_refused(word, said, run_of, export, tmp_path):
    run = run_of("run", word, *BARE, "data.size=8", "trainer.max_images=8")
    with pytest.raises(UserError, match=said) as refused:
        export(run, tmp_path / "out", "ema=false")
    assert refused.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_sdtrain_sample_draws_with_the_exported_pipeline_as_with_the_run(
    here, finetuned, averaged, tmp_path
):
    """To one level of colour: the table of betas is rounded."""
    drawn = {}
    for name, checkpoint in (("run", finetuned / "run"), ("pipeline", averaged)):
        output = tmp_path / f"drawn by {name}"
        words = [f"prompt={PROMPT}", "num_images=2", "steps=10", f"output={output}"]
        words.append("save_latents=true")
        result = here("sdtrain-sample", f"checkpoint={checkpoint}", *words)
        assert result.code == 0, result.err
        drawn[name] = [np.asarray(Image.open(path)) for path in sorted(output.glob("0*.png"))]
    assert len(drawn["run"]) == 2
    latents = load_file(tmp_path / "drawn by run" / "latents.safetensors")["latents"]
    assert latents.shape == (2, 4, 8, 8)
    expected = [KeyedRandom(seed, "image").normal(0, (4, 8, 8)) for seed in (0, 1)]
    assert np.array_equal(latents.numpy(), np.stack(expected))
    for ours, theirs in zip(drawn["run"], drawn["pipeline"], strict=True):
        assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1
        assert ours.std() > 0


def test_what_has_no_effect_on_a_pipeline_is_told(here, finetuned, tmp_path):
    pipeline = finetuned / "pipeline"
    words = ["prompt=x", "num_images=1", "steps=2", "ema=false", f"output={tmp_path}/drawn"]
    result = here("sdtrain-sample", f"checkpoint={pipeline}", *words)
    assert result.code == 0
    assert "ema=false has no effect" in result.err


def test_a_broken_pipeline_is_refused(here, averaged, tmp_path):
    folder = Path(shutil.copytree(averaged, tmp_path / "out"))
    (folder / "unet" / "config.json").write_text("{}")
    result = here("sdtrain-sample", f"checkpoint={folder}", "prompt=x", f"output={tmp_path}/drawn")
    assert result.code == 2
    assert "checkpoint=" in result.paragraph
    assert not (tmp_path / "drawn").exists()
