"""A plan to what is trained: data, module and loaders."""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from sdtrain.assemble.kept_files import (
    keep_autoencoder,
    keep_files,
    reading_copies,
)
from sdtrain.assemble.model import (
    build_model,
    check_fit,
    classes_line,
    seed_weights,
    truncated_captions,
)
from sdtrain.assemble.recorded import recorded
from sdtrain.config.build import build
from sdtrain.console import global_rank, warn
from sdtrain.data.draws import Collate
from sdtrain.data.skipped import Skipped
from sdtrain.data.split import held_out_notes
from sdtrain.diffusion.noise import Gaussian
from sdtrain.errors import StorageError
from sdtrain.files import write_text
from sdtrain.models.autoencoder import check_latent_scale
from sdtrain.redaction import redacted
from sdtrain.runs.data_record import DataRecord, write_data_record
from sdtrain.runs.layout import RunFolder
from sdtrain.training.autoencoder_module import AutoencoderModule
from sdtrain.training.datamodule import DataModule
from sdtrain.training.diffusion_module import DiffusionModule
from sdtrain.training.plan import Plan, try_optimizer
from sdtrain.training.progress import Progress
from sdtrain.types import PictureData, extras_of

CALIBRATION = 64
"""Training pictures on which the scale of the latents is checked."""


EXAMPLE_PROMPTS = 192
"""That a run keeps: as many as sdtrain-evaluate draws unless told otherwise."""
VARIED = 8
"""So many of them tell whether a shorter list is the beginning of a longer one."""
STRIDE = 119
"""Through the prompts, so that every beginning is spread over all of them: it shares no factor with
their number, and is about .618 of it."""


@dataclass
class Parts:
    """notes: lines to print about the data. recorded: {part of the model: keys that config.yaml
    adds to it}.
    """

    data: PictureData
    module: DiffusionModule | AutoencoderModule
    datamodule: DataModule
    notes: list[str]
    recorded: dict[str, dict[str, Any]] = field(default_factory=dict)


def build_parts(plan: Plan, data: PictureData, run_dir: Path, progress: Progress) -> Parts:
    """Raises DataError and UserError where the data are wrong, or do not fit the model."""
    config = plan.config
    notes = [*extras_of(data).notes, *_held_out_lines(config, data)]
    if plan.draft.trains_autoencoder:
        module = _autoencoder_module(config, plan, progress)
        collate = make_collate(config, module.latent_shape(data.image_size))
        parts = Parts(data, module, _datamodule(plan, data, collate, progress), notes)
    else:
        parts = _diffusion_parts(config, plan, data, run_dir, progress)
        parts.notes[:0] = notes
    trained = parts.module.trained().values()
    try_optimizer(parts.module.optimisation, config, trained)
    return parts


def _held_out_lines(config: dict, data: PictureData) -> list[str]:
    """Lines that say where another share is held out than was set, where fewer pictures are than
    are asked for, or one alone.
    """
    count = len(data.split("validation"))
    asked = {
        "validation.num_images": config.get("validation"),
        "callbacks.noise_levels.num_images": (config.get("callbacks") or {}).get("noise_levels"),
    }
    larger = []
    for key, node in asked.items():
        wanted = (node or {}).get("num_images")
        if isinstance(wanted, int) and wanted > count:
            larger.append(f"{key}={wanted}")
    lines = []
    fraction = config["data"].get("validation_fraction")
    if fraction is not None and config["data"]["_target_"].startswith("sdtrain."):
        lines += held_out_notes(count + len(data.split("train")), fraction)
    if larger:
        lines.append(f"{' and '.join(larger)}: the data hold out {count}, and all are used.")
    if count == 1:
        lines.append("One picture is held out: numbers of validation have no standard error.")
    return lines


def _diffusion_parts(
    config: dict, plan: Plan, data: PictureData, run_dir: Path, progress: Progress
) -> Parts:
    readable = reading_copies(config, RunFolder(run_dir), always=False)
    model = build_model(readable, run_dir, data)
    module = DiffusionModule(model=model, optimisation=plan.optimisation(), progress=progress)
    collate = Collate(
        seed=config["seed"],
        latent_shape=model.autoencoder.latent_shape(data.image_size),
        posterior=model.autoencoder.sample_posterior,
        stratified=model.objective.times.stratified,
        global_batch=progress.batch_size,
        noise=build(config["noise"], "noise"),
    )
    datamodule = _datamodule(plan, data, collate, progress)
    check_fit(model, data)
    notes = [classes_line(model, data), truncated_captions(model, data)]
    train = datamodule.train
    rows = [train[(place, place)] for place in range(min(CALIBRATION, len(train)))]
    check_latent_scale(model.autoencoder, model.latents_of_rows(rows))
    shown = [note for note in notes if note]
    return Parts(data, module, datamodule, shown, recorded(readable, model))


def _autoencoder_module(config: dict, plan: Plan, progress: Progress) -> AutoencoderModule:
    seed_weights(config["seed"], "autoencoder")
    given = {"optimisation": plan.optimisation(), "progress": progress}
    return build(config["model"], "model", **given)


def make_collate(config: dict, latent_shape: tuple[int, int, int]) -> Collate:
    """Of the training of an autoencoder, which has no noise levels."""
    return Collate(
        seed=config["seed"],
        latent_shape=latent_shape,
        posterior=True,
        stratified=False,
        global_batch=config["data"]["batch_size"],
        noise=Gaussian(),
    )


def _datamodule(plan: Plan, data: PictureData, collate: Collate, progress: Progress) -> DataModule:
    config = plan.config
    limit = extras_of(data).max_skipped
    return DataModule(
        data=data,
        num_workers=config["data"]["num_workers"],
        seed=config["seed"],
        collate=collate,
        progress=progress,
        accumulate=plan.draft.trainer.accumulate,
        skipped=None if limit is None else Skipped(limit=limit, report=warn),
    )


def saved_config(plan: Plan, parts: Parts | None = None) -> str:
    """The resolved configuration as yaml, without secrets.

    parts: once they are built, the hashes of the frozen weights and of the data's listing are
    written into it.
    """
    config = copy.deepcopy(plan.config)
    del config["resume"], config["resume_allow"]
    if parts is not None:
        for name, added in parts.recorded.items():
            config["model"][name] |= added
        extras = extras_of(parts.data)
        listing = extras.sha256
        if "label" in reads_of(parts):
            listing = extras.classes.sha256 if extras.classes else listing
        if listing:
            config["data"]["sha256"] = listing
    return OmegaConf.to_yaml(OmegaConf.create(redacted(config)))


def reads_of(parts: Parts) -> frozenset[str]:
    """What the model is told of; nothing of an autoencoder."""
    if isinstance(parts.module, AutoencoderModule):
        return frozenset()
    return parts.module.model.conditioner.reads


def keep_what_drawing_needs(folder: RunFolder, plan: Plan, parts: Parts) -> None:
    """Writes what is known of the data, and small files that the model reads, on rank 0. Raises
    StorageError.
    """
    if global_rank() > 0 or plan.draft.trains_autoencoder:
        return
    data = parts.data
    model = parts.module.model
    prompts = _varied_prompts(data) if "caption" in reads_of(parts) else []
    classes = extras_of(data).classes
    untrained = classes.untrained if classes else ()
    record = DataRecord(data.image_size, data.num_classes, prompts, os.getcwd(), untrained)
    with _written(folder):
        write_data_record(folder, record)
        keep_files(plan.config, folder)
        keep_autoencoder(model.autoencoder, folder)


def _varied_prompts(data: PictureData) -> list[str]:
    prompts = data.example_prompts(EXAMPLE_PROMPTS)
    if data.example_prompts(VARIED) != prompts[:VARIED]:
        # They follow the order of the data: neighbours may be alike, those far apart less so.
        prompts = [prompts[place * STRIDE % len(prompts)] for place in range(len(prompts))]
    return prompts


def set_threads(threads: int | None) -> None:
    """torch's CPU threads; None leaves them as they are."""
    if threads:
        torch.set_num_threads(threads)


def write_config(folder: RunFolder, config: str) -> None:
    """Writes config.yaml, on rank 0. Raises StorageError."""
    if global_rank() > 0:
        return
    with _written(folder):
        write_text(folder.config, config)


@contextmanager
def _written(folder: RunFolder) -> Iterator[None]:
    """Raises StorageError where the disk refuses."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{folder.path} cannot be written: {error.strerror}",
            key="hydra.run.dir",
            remedy="Set hydra.run.dir to another folder.",
        ) from error
