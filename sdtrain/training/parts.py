"""Builds what a plan trains: data, LightningModule and loaders; and writes what later commands read
of them into the run's folder.
"""

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from sdtrain.assemble.config_additions import config_additions
from sdtrain.assemble.kept_files import (
    keep_autoencoder,
    keep_files,
    use_copies,
)
from sdtrain.assemble.model import (
    bucket_latent_shapes,
    build_model,
    check_fit,
    classes_line,
    seed_weights,
    truncated_captions_line,
)
from sdtrain.config.build import build
from sdtrain.console import global_rank, warn
from sdtrain.data.buckets import buckets_of
from sdtrain.data.cached import empty_context_of
from sdtrain.data.draws import Collate
from sdtrain.data.skipped import Skipped
from sdtrain.data.split import held_out_notes
from sdtrain.diffusion.noise import Gaussian
from sdtrain.errors import StorageError, UserError
from sdtrain.files import write_text
from sdtrain.latent_diffusion import LatentDiffusion
from sdtrain.models.autoencoder import check_latent_scale
from sdtrain.redaction import redacted
from sdtrain.runs.data_record import DataRecord, write_data_record
from sdtrain.runs.layout import RunFolder
from sdtrain.training.autoencoder_module import AutoencoderModule
from sdtrain.training.datamodule import DataModule
from sdtrain.training.diffusion_module import DiffusionModule
from sdtrain.training.plan import Plan, check_optimizer
from sdtrain.training.progress import Progress
from sdtrain.types import PictureData, captions_of, extras_of

UseCache = Callable[[PictureData, LatentDiffusion], PictureData]
"""(data set, model) -> the data set whose rows bring cached latents."""

CALIBRATION = 64
"""Number of training pictures on which the scale of the latents is checked, if they have at most
CALIBRATION_SIDE pixels a side."""
CALIBRATION_SIDE = 64
MIN_CALIBRATION = 8
"""Number of larger ones: the autoencoder of Stable Diffusion takes 25 seconds for one of 512 x 512
pixels on one CPU core."""

EXAMPLE_PROMPTS = 192
"""Number of prompts kept with a run: the default number of samples of sdtrain-evaluate."""
PREFIX_LENGTH = 8
"""Number of prompts by which to tell whether a data set's shorter list of prompts is the beginning
of its longer one."""
STRIDE = 119
"""Step through the prompts, so that the first few are spread over the whole list. It is coprime to
EXAMPLE_PROMPTS and about 0.618 of it."""


@dataclass
class Parts:
    """What a run trains and on what.

    notes: lines to print about the data. recorded: {part of the model: keys to add to it in
    config.yaml}.
    """

    data: PictureData
    module: DiffusionModule | AutoencoderModule
    datamodule: DataModule
    notes: list[str]
    recorded: dict[str, dict[str, Any]] = field(default_factory=dict)


def build_parts(
    plan: Plan,
    data: PictureData,
    run_dir: Path,
    progress: Progress,
    use_cache: UseCache | None = None,
) -> Parts:
    """Build the module and the loaders.

    use_cache: takes the data set and the model, and returns the data set whose rows bring cached
    latents; None for a run without a cache.

    Raises DataError or UserError if the data are wrong or do not fit the model.
    """
    config = plan.config
    notes = [*extras_of(data).notes, *_held_out_lines(config, data)]
    if plan.prechecked.trains_autoencoder:
        module = _autoencoder_module(config, plan, progress)
        collate = plain_collate(config, module.latent_shape(data.image_size))
        parts = Parts(data, module, _datamodule(plan, data, collate, progress), notes)
    else:
        parts = _diffusion_parts(plan, data, run_dir, progress, use_cache)
        parts.notes[:0] = notes
    check_optimizer(config, parts.module.make_optimizer)
    return parts


def _held_out_lines(config: dict, data: PictureData) -> list[str]:
    """Return lines for the user about the validation split.

    They say if its share is not the configured one, if it has fewer pictures than the callbacks
    want, and if it has only one.
    """
    count = len(data.split("validation"))
    nodes = {
        "validation.num_images": config.get("validation"),
        "callbacks.noise_levels.num_images": (config.get("callbacks") or {}).get("noise_levels"),
    }
    too_large = []
    for key, node in nodes.items():
        num_images = (node or {}).get("num_images")
        if isinstance(num_images, int) and num_images > count:
            too_large.append(f"{key}={num_images}")
    lines = []
    fraction = config["data"].get("validation_fraction")
    if fraction is not None and config["data"]["_target_"].startswith("sdtrain."):
        lines += held_out_notes(count + len(data.split("train")), fraction)
    if too_large:
        settings = " and ".join(too_large)
        lines.append(f"{settings}: the data hold out {count}, and all are used.")
    if count == 1:
        lines.append("Only one picture is held out: validation metrics have no standard error.")
    return lines


def _diffusion_parts(
    plan: Plan,
    data: PictureData,
    run_dir: Path,
    progress: Progress,
    use_cache: UseCache | None,
) -> Parts:
    config = plan.config
    config_with_copies = use_copies(config, RunFolder(run_dir), always=False)
    _check_word_is_used(config, data)
    model = build_model(config_with_copies, run_dir, data)
    if use_cache is not None:
        data = use_cache(data, model)
    module = DiffusionModule(model=model, optimisation=plan.optimisation(), progress=progress)
    collate = Collate(
        seed=config["seed"],
        latent_shape=model.autoencoder.latent_shape(data.image_size),
        posterior=model.autoencoder.sample_posterior,
        stratified=model.objective.times.stratified,
        global_batch=progress.batch_size,
        noise=build(config["noise"], "noise"),
        tokenize=model.conditioner.tokenize,
        caption_dropout=model.caption_dropout,
        latent_shapes=bucket_latent_shapes(model, data),
        empty_context=empty_context_of(data),
        channels=tuple(model.channels),
        masks="mask" in model.reads,
    )
    datamodule = _datamodule(plan, data, collate, progress)
    check_fit(model, data)
    check_latent_scale(model.autoencoder, calibration_latents(model, data))
    notes = []
    for note in (classes_line(model, data), truncated_captions_line(model, data)):
        if note:
            notes.append(note)
    return Parts(data, module, datamodule, notes, config_additions(config_with_copies, model))


def _check_word_is_used(config: dict, data: PictureData) -> None:
    """Raise UserError if no caption holds the word that an adapter is to learn."""
    word = (config.get("adapter") or {}).get("word")
    if word is None:
        return
    captions = captions_of(data.split("train")) or data.example_prompts(EXAMPLE_PROMPTS)
    if not any(word in caption.lower() for caption in captions):
        raise UserError(
            "is in none of the captions, so that it would not be trained",
            key="adapter.word",
            value=word,
            remedy='Write it into the captions, or set data.caption_template="a photo of '
            f'{word}", which is then the caption of all pictures.',
        )


def calibration_latents(model: LatentDiffusion, data: PictureData) -> Tensor:
    """Return latents [N, C, h, w] of the first training pictures.

    They are encoded in batches with as many pixels as CALIBRATION of the side CALIBRATION_SIDE.
    With buckets they are those of the largest one, since all must have one size.
    """
    train = data.split("train")
    buckets = buckets_of(train)
    indices = range(len(train))
    if buckets is not None:
        indices = max(buckets.members(), key=len).tolist()
    batch_size = max(1, CALIBRATION * CALIBRATION_SIDE**2 // data.image_size**2)
    count = min(CALIBRATION, max(MIN_CALIBRATION, batch_size), len(indices))
    latents = []
    for start in range(0, count, batch_size):
        stop = min(count, start + batch_size)
        rows = [train[(index, index)] for index in indices[start:stop]]
        latents.append(model.latents_of_rows(rows))
    return torch.cat(latents)


def _autoencoder_module(config: dict, plan: Plan, progress: Progress) -> AutoencoderModule:
    seed_weights(config["seed"], "autoencoder")
    return build(config["model"], "model", optimisation=plan.optimisation(), progress=progress)


def plain_collate(
    config: dict, latent_shape: tuple[int, int, int], model: LatentDiffusion | None = None
) -> Collate:
    """Return a collate function for which the model's noise and times do not matter, as for an
    autoencoder, which has no noise levels.

    model: whose conditions the batches bring; None for an autoencoder.
    """
    return Collate(
        channels=() if model is None else tuple(model.channels),
        masks=model is not None and "mask" in model.reads,
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
        accumulate=plan.prechecked.trainer.accumulate,
        skipped=None if limit is None else Skipped(limit=limit, warn=warn),
    )


def saved_config(plan: Plan, parts: Parts | None = None) -> str:
    """Return the resolved configuration as yaml, without secrets.

    parts: if given, the yaml includes the hashes of the frozen weights and of the list of pictures.
    """
    config = copy.deepcopy(plan.config)
    del config["resume"], config["resume_allow"]
    config["data"].pop("refresh", None)  # asked of one start
    if parts is not None:
        for name, added in parts.recorded.items():
            config["model"][name] |= added
        extras = extras_of(parts.data)
        data_hash = extras.sha256
        if "label" in conditions_read(parts) and extras.classes:
            data_hash = extras.classes.sha256
        if data_hash:
            config["data"]["sha256"] = data_hash
    return OmegaConf.to_yaml(OmegaConf.create(redacted(config)))


def conditions_read(parts: Parts) -> frozenset[str]:
    """Return the conditions that the model reads ("caption", "label", "depth"); an autoencoder
    reads none.
    """
    if isinstance(parts.module, AutoencoderModule):
        return frozenset()
    return parts.module.model.reads


def keep_files_for_sampling(folder: RunFolder, plan: Plan, parts: Parts) -> None:
    """Write what sampling needs without the data into the run's folder, on rank 0: the data record,
    small files that the model reads, and a copy of the autoencoder. Raises StorageError.
    """
    if global_rank() > 0 or plan.prechecked.trains_autoencoder:
        return
    data = parts.data
    model = parts.module.model
    prompts = _varied_prompts(data) if "caption" in conditions_read(parts) else []
    classes = extras_of(data).classes
    untrained = classes.untrained if classes else ()
    record = DataRecord(data.image_size, data.num_classes, prompts, os.getcwd(), untrained)
    with _storage_errors(folder):
        write_data_record(folder, record)
        keep_files(plan.config, folder)
        keep_autoencoder(model.autoencoder, folder)


def _varied_prompts(data: PictureData) -> list[str]:
    """Return EXAMPLE_PROMPTS prompts of the data of which any first few are varied."""
    prompts = data.example_prompts(EXAMPLE_PROMPTS)
    if data.example_prompts(PREFIX_LENGTH) != prompts[:PREFIX_LENGTH]:
        # They follow the order of the data: neighbours may be alike, those far apart less so.
        prompts = [prompts[index * STRIDE % len(prompts)] for index in range(len(prompts))]
    return prompts


def set_threads(threads: int | None) -> None:
    """Set the number of torch's CPU threads; None leaves it as it is."""
    if threads:
        torch.set_num_threads(threads)


def write_config(folder: RunFolder, config: str) -> None:
    """Write config.yaml, on rank 0. Raises StorageError."""
    if global_rank() > 0:
        return
    with _storage_errors(folder):
        write_text(folder.config, config)


@contextmanager
def _storage_errors(folder: RunFolder) -> Iterator[None]:
    """Turn an OSError of a write into `folder` into a StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{folder.path} cannot be written: {error.strerror}",
            key="hydra.run.dir",
            remedy="Set hydra.run.dir to another folder.",
        ) from error
