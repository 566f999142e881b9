"""The model card of an exported pipeline."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionDepth2ImgPipeline, StableDiffusionInpaintPipeline
from omegaconf import OmegaConf
from PIL import Image

from sdtrain.assemble.drawing import grid_record
from sdtrain.assemble.load import LoadedCheckpoint
from sdtrain.config.optimizers import is_schedule_free
from sdtrain.config.schema import ExportConfig
from sdtrain.export.pipeline import pipeline_class
from sdtrain.export.single_file import FILE
from sdtrain.files import write_text
from sdtrain.generation.drawing import record_of
from sdtrain.latent_diffusion import LatentDiffusion
from sdtrain.models.single_file import shipped_tokenizer
from sdtrain.pictures import read_notes
from sdtrain.runs.layout import RunFolder, images_seen_of
from sdtrain.runs.metrics import read_metrics

CARD = "README.md"
SAMPLES = "samples.png"
LONGEST_LIST = 20
"""Longest list of the configuration that the card shows."""

SECTIONS = (
    "adapter",
    "data",
    "schedule",
    "modifiers",
    "prediction",
    "weighting",
    "loss",
    "times",
    "seed",
)
"""Sections of the run's configuration that the card shows, beside the model."""


PATHS = ("/", "~", "../", "file:")
"""Beginnings of paths of this machine."""

STABLE_DIFFUSION = ("sdtrain.schedules.scaled_linear.scaled_linear", 0.00085, 0.012)
"""Schedule that other programs assume for a single file, and its first and last beta."""

LATENT_SCALE = 0.18215
"""Scale of the latents that they assume."""


def lost_lines(saved: dict, model: LatentDiffusion, *, single_file: bool) -> list[str]:
    """Return a line for each setting of the run's samples that the exported files lack.

    saved: the run's configuration. model: what is exported. single_file: whether the weights are
    in one file.
    """
    guidance = saved.get("guidance") or {}
    lines = _lines_of_single_file(saved, model) if single_file else []
    sampler = record_of(saved["sampler"])["name"]
    grid = grid_record(saved["grid"], model.objective.schedule)["name"]
    if (sampler, grid) != ("ddim", "trailing"):
        lines.append(
            f"The run's samples are drawn by {sampler} on the grid {grid}, those of a pipeline by "
            "ddim on the trailing one. Compare with sdtrain-sample sampler=ddim grid=trailing."
        )
    if guidance.get("max_std") is not None:
        lines.append(
            f"guidance.max_std={guidance['max_std']:g} is lost: a pipeline does not bound the "
            "standard deviation of x0. Compare with sdtrain-sample guidance.max_std=null."
        )
    if guidance.get("rescale"):
        lines.append(f"guidance.rescale is lost: pass guidance_rescale={guidance['rescale']:g}.")
    return lines


def _lines_of_single_file(saved: dict, model: LatentDiffusion) -> list[str]:
    """Return a line for each setting that is beside a single file instead of in it, and differs
    from what programs assume that read the file alone.
    """
    schedule = saved["schedule"]
    known = (schedule["_target_"], schedule.get("beta_start"), schedule.get("beta_end"))
    lines = []
    if not _is_epsilon(saved):
        lines.append(
            "That the network predicts v is not in the single file: programs that read the file "
            "alone may take it for epsilon."
        )
    if known != STABLE_DIFFUSION or saved.get("modifiers"):
        lines.append(
            "The schedule is not in the single file, but in scheduler/ beside it: programs that "
            "read the file alone draw with Stable Diffusion's schedule, another than this run's."
        )
    scale = model.autoencoder.latent_scale
    if not math.isclose(scale, LATENT_SCALE):
        lines.append(
            f"The scale of the latents, {scale:.5g}, is not in the single file, but in vae/ beside "
            f"it: programs that read the file alone take {LATENT_SCALE}."
        )
    clip = json.loads((shipped_tokenizer() / "vocab.json").read_text(encoding="utf-8"))
    if model.conditioner.tokenizer.get_vocab() != clip:
        lines.append(
            "The vocabulary is not in the single file, but in tokenizer/ beside it: programs that "
            "read the file alone take CLIP's, another than this run's."
        )
    return lines


def _is_epsilon(saved: dict) -> bool:
    return saved["prediction"]["_target_"].endswith(".Epsilon")


def _weights_name(config: ExportConfig, saved: dict) -> str:
    """Return the words for the weights that are exported."""
    if is_schedule_free(saved):
        return "averaged (schedule-free)"
    return "averaged (EMA)" if config.ema else "raw"


def write_card(config: ExportConfig, loaded: LoadedCheckpoint, saved: dict) -> None:
    """Write the card, and the last grid of samples of the run beside it. Raises OSError."""
    folder = Path(config.output)
    run = loaded.checkpoint.run
    scale = saved["guidance_scale"]
    text = [
        "---",
        "library_name: diffusers",
        "pipeline_tag: text-to-image",
        "license: other  # fill in",
        "---",
        "",
        f"# {saved.get('name', 'model')}",
        "",
        f"Trained with sdtrain on {loaded.checkpoint.images_seen} images. Weights: "
        f"{_weights_name(config, saved)}, {config.dtype}.",
        "",
        "```python",
        *_drawing_code(loaded, config.format, scale),
        "```",
        "",
    ]
    grid = _newest_grid(run)
    if grid is not None:
        shutil.copyfile(grid, folder / SAMPLES)
        text += [f"![samples of the run, each above its prompt]({SAMPLES})", ""]
        text += [*_prompt_lines(run, grid), ""]
    text += ["## Metrics", "", *_metric_rows(run), ""]
    lost = lost_lines(saved, loaded.model, single_file=config.format == "single_file")
    if lost:
        text += ["## What differs from sdtrain's samples", "", *[f"* {line}" for line in lost], ""]
    sections = {name: saved[name] for name in SECTIONS if saved.get(name) is not None}
    sections["model"] = saved["model"]
    sections = _without_paths(sections)
    text += ["## Configuration", "", "```yaml", OmegaConf.to_yaml(sections).rstrip(), "```", ""]
    text += [
        "## Licence",
        "",
        "Fill in: of the pictures, of pretrained weights and of this model.",
        "",
    ]
    write_text(folder / CARD, "\n".join(text))


def _drawing_code(loaded: LoadedCheckpoint, file_format: str, scale: float) -> list[str]:
    """Return the lines of Python that load the pipeline with diffusers and draw with it."""
    kind = pipeline_class(loaded.model)
    name = kind.__name__
    arguments = ['"FOLDER"']
    inputs = "prompt"
    if kind is StableDiffusionDepth2ImgPipeline:
        arguments += ["depth_estimator=None", "feature_extractor=None"]
        # depth_map: a tensor [1, H, W], larger is nearer.
        inputs = "prompt, image=image, depth_map=depth_map, strength=1.0"
    elif kind is StableDiffusionInpaintPipeline:
        inputs = "prompt, image=image, mask_image=mask, strength=1.0"
    loading = f"from_pretrained({', '.join(arguments)})"
    if file_format == "single_file":
        loading = f'from_single_file("FOLDER/{FILE}", config="FOLDER")'
    return [
        f"from diffusers import {name}",
        f"pipeline = {name}.{loading}",
        f'prompt = "{_prompt(loaded)}"',
        f"images = pipeline({inputs}, num_inference_steps=50, guidance_scale={scale:g}).images",
    ]


def _without_paths(node: Any) -> Any:
    """Return a copy that can be published.

    Absolute paths are cut to their last component, and long lists are replaced by their length.
    """
    if isinstance(node, dict):
        return {key: _without_paths(value) for key, value in node.items()}
    if isinstance(node, list):
        if len(node) > LONGEST_LIST:
            return f"{len(node)} values"
        return [_without_paths(value) for value in node]
    if isinstance(node, str) and node.startswith(PATHS):
        return Path(node).name
    return node


def _prompt(loaded: LoadedCheckpoint) -> str:
    prompts = loaded.record.example_prompts if loaded.record else ()
    return (prompts[0] if prompts else "PROMPT").replace('"', '\\"')


def _newest_grid(run: RunFolder) -> Path | None:
    """Return the newest grid of samples, other than that of the unchanged model."""
    unchanged = run.sample("grid", 0)
    grids = sorted(grid for grid in run.samples.glob("grid-*.png") if grid != unchanged)
    return grids[-1] if grids else None


def _prompt_lines(run: RunFolder, grid: Path) -> list[str]:
    """Return a line for each picture of a grid, with its prompt and seed."""
    images_seen = images_seen_of(grid)
    try:
        with Image.open(run.pictures(images_seen)) as row:
            requests = read_notes(row)["requests"]
    except (OSError, ValueError, KeyError, AttributeError):  # removed, or of another program
        return []
    lines = []
    for number, request in enumerate(requests, start=1):
        lines.append(f"{number}. {request['prompt']} (seed {request['seed']})")
    return lines


def _metric_rows(run: RunFolder) -> list[str]:
    """Return a table of the last value of each validation metric, with its 95 % interval."""
    last: dict[str, float] = {}
    for record in read_metrics(run.metrics):
        for key, value in record.items():
            if key.startswith("validation/") and isinstance(value, int | float):
                last[key] = value
    rows = ["| metric | value | 95 % interval |", "|---|---|---|"]
    for key, value in last.items():
        if key.endswith("_error"):
            continue
        error = last.get(f"{key}_error")
        interval = "" if error is None else f"+- {1.96 * error:.3g}"
        rows.append(f"| {key.removeprefix('validation/')} | {value:.5g} | {interval} |")
    return rows if len(rows) > 2 else ["The run has measured none."]
