"""The files of adapters in diffusers itself: it draws what the run draws."""

import pytest
import stored_pictures
from diffusers import StableDiffusionPipeline
from reading import newest, with_option, with_values
from stable_diffusion import save_pipeline

from sdtrain.assemble.drawing import build_drawing
from sdtrain.assemble.load import load
from sdtrain.export.scheduler import scheduler_of
from sdtrain.generation.drawing import Request
from sdtrain.generation.generate import generate, starting_latents
from sdtrain.runs.layout import CheckpointFolder

STEPS = 10
PROMPT = "a <gem>"
ADAPTERS = {
    "embedding": [
        "adapter=textual_inversion",
        "adapter.word=<gem>",
        "adapter.initial=red",
        "adapter.vectors=3",
        "optimizer.lr=0.5",
    ],
    "diffusers": ["adapter=lora", "adapter.rank=2", "adapter.alpha=3", "optimizer.lr=0.05"],
}
ADAPTERS["kohya"] = ADAPTERS["diffusers"]
ADAPTERS["diffusers, text too"] = [*ADAPTERS["diffusers"], "adapter.text_encoder=true"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("base") / "pipeline")


def drawn_by_diffusers(folder, scheduler, latents, layout, adapter):
    """A picture [1, 3, H, W] in [0, 1] of a pipeline to which a file of that layout was added."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = scheduler
    if layout == "embedding":
        pipeline.load_textual_inversion(adapter)
    elif layout is not None:
        pipeline.load_lora_weights(adapter)
    return pipeline(
        PROMPT, latents=latents, num_inference_steps=STEPS, guidance_scale=3.0, output_type="pt"
    ).images


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTERS)
def test_diffusers_draws_the_same(name, pipeline, train_tiny, here, composed, tmp_path):
    pictures = stored_pictures.write_folder(tmp_path / "pictures", stored_pictures.rows(16))
    run = tmp_path / "run"
    words = [
        "model=stable_diffusion",
        f"model.pretrained={pipeline}",
        "data=images",
        f"data.path={pictures}",
        f"data.caption_template={PROMPT}",
        "data.image_size=32",
        "data.upscale=true",
        "data.num_workers=0",
        "callbacks.samples.every=0",
        "validation.every=0",
    ]
    result = train_tiny(run, *words, *ADAPTERS[name])
    assert result.code == 0, result.err
    layout = name.partition(",")[0]
    output = tmp_path / "adapter"
    result = here("sdtrain-export", f"checkpoint={run}", f"format={layout}", f"output={output}")
    assert result.code == 0, result.err

    model = load(CheckpointFolder(newest(run)), ema=True, device="cpu", allow=[]).model
    default = with_option(composed(config="sample"), "grid=trailing")
    settings = with_values(default, "guidance.max_std=null", f"steps={STEPS}")
    drawing = build_drawing(settings, model.objective.schedule)
    requests = [Request(3, PROMPT)]
    ours = generate(model, requests, drawing, 32) / 2 + 0.5
    latents = starting_latents(model, requests, drawing, 32)
    scheduler = scheduler_of(model.objective.schedule, model.objective.prediction)
    without = drawn_by_diffusers(pipeline, scheduler, latents, None, output)
    theirs = drawn_by_diffusers(pipeline, scheduler, latents, layout, output)
    assert (theirs - ours).abs().max() < 1e-3
    assert (without - ours).abs().max() > 1e-2
