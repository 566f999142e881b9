"""Prints the summaries before and after a run."""

import shlex
from collections.abc import Iterable

from rich.console import Console
from rich.text import Text
from torch import nn

from sdtrain.assemble.load import BUILT
from sdtrain.config.optimizers import is_schedule_free
from sdtrain.config.overrides import text_override
from sdtrain.config.trusted import foreign_packages
from sdtrain.data.buckets import buckets_of
from sdtrain.latent_diffusion import LatentDiffusion
from sdtrain.runs.layout import RunFolder
from sdtrain.runs.manifest import list_checkpoints
from sdtrain.training.callbacks.assembly import CallbackSet
from sdtrain.training.optimisation import Cosine
from sdtrain.training.outcome import Run
from sdtrain.training.parts import Parts
from sdtrain.training.plan import Plan
from sdtrain.training.progress import Progress

Rows = list[tuple[str, str]]
"""(name, value)."""


def print_plan(run: Run, plan: Plan, parts: Parts) -> None:
    """Print what is trained, on what, for how long, and where it is written."""
    config = plan.config
    trainer = plan.prechecked.trainer
    train = len(parts.datamodule.train)
    held_out = len(parts.datamodule.validation)
    sizes = f"{parts.data.image_size} x {parts.data.image_size}"
    buckets = buckets_of(parts.datamodule.train)
    if buckets is not None:
        sizes = f"{len(buckets.sizes)} sizes of about {sizes} pixels"
    ranks = f", {trainer.devices} ranks" if trainer.devices > 1 else ""
    batches = f"{trainer.max_images} images in batches of {run.progress.batch_size}{ranks}"
    rows = [
        *_model_rows(plan, parts),
        ("pictures", f"{train} of {sizes} for training, {held_out} for validation"),
        ("budget", f"{batches}, lr {config['optimizer'].get('lr')}, seed {config['seed']}"),
        ("writes", str(run.folder.path)),
    ]
    print_table(run.console, f"sdtrain: {config['name']}", rows)


def _model_rows(plan: Plan, parts: Parts) -> Rows:
    if plan.prechecked.trains_autoencoder:
        return [("trains", f"AutoencoderKL {_count(parts.module.parameters())} parameters")]
    config = plan.config
    model: LatentDiffusion = parts.module.model
    frozen_parts = model.frozen_parts()
    trained = []
    frozen = []
    for name in ("unet", "conditioner"):
        target = _last_name(config["model"][name])
        part = getattr(model, name)
        if model.adapted is not None:
            added = [each for each in part.parameters() if each.requires_grad]
            own = [each for each in part.parameters() if not each.requires_grad]
            frozen.append(f"{target} {_count(own)}")
            if added:
                trained.append(f"{_last_name(config['adapter'])} of {target} {_count(added)}")
            continue
        line = f"{target} {_count(part.parameters())}"
        (frozen if name in frozen_parts else trained).append(line)
    shape = model.autoencoder.latent_shape(parts.data.image_size)
    path = config["model"]["autoencoder"].get("path", "pixels")
    latents = " x ".join(str(size) for size in shape)
    scale = model.autoencoder.latent_scale
    prediction = _last_name(config["prediction"])
    schedule = model.objective.schedule.name
    weighting = _last_name(config["weighting"])
    rows = [("trains", f"{', '.join(trained)} parameters")]
    if frozen:
        rows.append(("frozen", f"{', '.join(frozen)} parameters"))
    return [
        *rows,
        ("autoencoder", f"{path}, latents {latents}, scale {scale:.4g}"),
        ("objective", f"prediction {prediction}, schedule {schedule}, weighting {weighting}"),
    ]


def print_result(run: Run, plan: Plan, parts: Parts, callbacks: CallbackSet, left_out: str) -> None:
    """Print the last metrics of a run, where its pictures and weights are, and the next command.

    left_out: what the budget of looks had no room for.
    """
    rows = []
    metrics = _last_metrics(callbacks)
    if metrics:
        rows.append(("result", ", ".join(metrics)))
    if left_out:
        rows.append(("reduced", left_out))
    for callback in callbacks.named.values():
        grid = getattr(callback, "last_grid", None)
        if grid:
            rows.append(("samples", str(grid)))
            break
    if run.progress.ends_at <= run.progress.images_seen < run.progress.max_images:
        rows.append(("time is up", _ended_early(run.progress, parts)))
    saved = list_checkpoints(run.folder.path)
    if saved:
        rows.append(("checkpoint", str(saved[-1])))
    averaged = callbacks.ema is not None or is_schedule_free(plan.config)
    command = _next_command(run, plan, parts, averaged)
    if command:
        rows.append(("next", command))
    seen = run.progress.images_seen
    print_table(run.console, f"finished: {seen} images seen", rows)


def _ended_early(progress: Progress, parts: Parts) -> str:
    """Describe the progress of a run that trainer.max_minutes has ended."""
    seen = progress.images_seen
    lr_schedule = parts.module.optimisation.lr_schedule
    factor = lr_schedule(seen, progress.max_images)
    text = (
        f"at {seen} of {progress.max_images} images, the learning rate at {factor:.0%} of its peak"
    )
    if isinstance(lr_schedule, Cosine):
        text += f"; with trainer.max_images={seen} it would have reached the end of its schedule"
    return text


def _last_metrics(callbacks: CallbackSet) -> list[str]:
    latest = dict(callbacks.metrics_log.latest)
    for callback in (callbacks.validation, callbacks.named.get("noise_levels")):
        latest |= getattr(callback, "latest", {})
    texts = []
    for key, value in latest.items():
        if key == "train/loss" or key.startswith("validation/"):
            texts.append(f"{key} {value:.4g}")
    if latest.get("validation/bits_saved", 0) < 0:
        texts.append("untrained: worse than the best linear denoiser")
    return texts


def _next_command(run: Run, plan: Plan, parts: Parts, averaged: bool) -> str | None:
    """Return a shell command that uses the trained model, with prompts and paths quoted.

    None if sdtrain-sample cannot supply all conditions that the model reads.
    """
    folder = run.folder
    if plan.prechecked.trains_autoencoder:
        return _diffusion_command(folder, plan)
    reads = parts.module.model.reads
    if reads & {"depth", "mask"}:
        return None
    words = ["sdtrain-sample", text_override("checkpoint", str(folder.path))]
    if "caption" in reads:
        words.append(text_override("prompt", parts.data.example_prompts(1)[0]))
    if "label" in reads:
        names = parts.module.model.conditioner.class_names
        words.append(text_override("label", names[0]) if names else "label=0")
    if not averaged:
        words.append("ema=false")
    packages = foreign_packages([plan.config.get(section) for section in BUILT])
    if packages:
        words.append(f"allow=[{','.join(packages)}]")
    return shlex.join([*words, "output=samples"])


def _diffusion_command(folder: RunFolder, plan: Plan) -> str | None:
    """Return the command that trains a diffusion model of the same pictures on this autoencoder.

    None for a first stage, whose run continues by itself.
    """
    if folder.is_first_stage:
        return None
    data = plan.config["data"]
    module = data["_target_"].removeprefix("sdtrain.data.").partition(".")[0]
    words = [f"data={module}"] if data["_target_"].startswith("sdtrain.data.") else []
    words.append(text_override("model.autoencoder.path", str(folder.autoencoder)))
    if "path" in data:
        words.append(text_override("data.path", str(data["path"])))
    if "image_size" in data:
        words.append(f"data.image_size={data['image_size']}")
    return shlex.join(["sdtrain", *words])


def print_table(console: Console, title: str, rows: Rows) -> None:
    """Print names and values in two columns. Long lines are not wrapped, so that a path or a
    command can be copied as a whole.
    """
    console.print(Text(title, style="bold"))
    for name, value in rows:
        console.print(Text(f"  {name:<13}", style="cyan"), Text(value), sep="", soft_wrap=True)


def _count(parameters: Iterable[nn.Parameter]) -> str:
    count = sum(p.numel() for p in parameters)
    return f"{count:,}" if count < 1e5 else f"{count / 1e6:.2f} M"


def _last_name(node: dict) -> str:
    return node["_target_"].rpartition(".")[2]
