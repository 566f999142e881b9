"""A trained model out of a run's checkpoint. What its configuration names is checked before
anything of it is imported.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sdtrain.assemble.kept_files import SHA256, check_files, reading_copies
from sdtrain.assemble.model import build_model
from sdtrain.assemble.training_data import TrainingData
from sdtrain.config.draft import is_autoencoder
from sdtrain.config.trusted import check_targets, renewed
from sdtrain.errors import StorageError, UserError
from sdtrain.latent_diffusion import LatentDiffusion
from sdtrain.models.autoencoder import Autoencoder
from sdtrain.paths import find_folder
from sdtrain.runs.checkpoint import read_weights
from sdtrain.runs.config import read_config
from sdtrain.runs.data_record import DataRecord, read_data_record
from sdtrain.runs.layout import CheckpointFolder, RunFolder

BUILT = (
    "model",
    "schedule",
    "modifiers",
    "prediction",
    "weighting",
    "loss",
    "times",
)
"""What is built of a checkpoint's configuration, beside the data set."""

READ = ("seed", "guidance_scale")
"""Plain values that are read from it."""


@dataclass
class Loaded:
    """A run's model with the weights asked for, and its configuration.

    checkpoint: the folder they were read from. source: gives the data set that it was trained on.
    record: what the run remembers of that; None of a run that an earlier version trained.
    """

    model: LatentDiffusion
    cfg: dict[str, Any]
    checkpoint: CheckpointFolder
    source: TrainingData
    record: DataRecord | None

    @property
    def image_size(self) -> int:
        if self.record is not None:
            return self.record.image_size
        return self.cfg["data"].get("image_size") or self.source.data.image_size


def load(
    folder: CheckpointFolder,
    *,
    ema: bool,
    device: str,
    allow: list[str],
    autoencoder: str | None,
    data: dict[str, Any] | None = None,
) -> Loaded:
    """The model of a checkpoint that `find_checkpoint` has found whole. Raises UserError where it
    holds none that draws.

    ema: averaged weights. allow: packages that its configuration may build from. autoencoder: where
    that has moved to. data: what differs from the data set's own arguments. The pictures are not
    looked for, nor is the class of the data set, before they are asked for.
    """
    saved = renewed(read_config(folder.config))
    if is_autoencoder(saved):
        raise UserError(
            "is an autoencoder's run: it draws nothing by itself",
            key="checkpoint",
            value=str(folder.path),
            remedy="Give the run of a diffusion model in checkpoint.",
        )
    for key in ("model", "schedule"):
        if not saved.get(key):
            raise StorageError(
                f"{folder.config} has no {key}: it is no diffusion model's",
                key="checkpoint",
                remedy="Give the run of a diffusion model in checkpoint.",
            )
    check_targets({key: saved.get(key) for key in BUILT}, allow)
    cfg = {key: value for key, value in saved.items() if key in (*BUILT, *READ)}
    cfg["data"] = saved.get("data") or {}
    record = read_data_record(folder.run)
    _find_autoencoder(cfg, folder.run, record, autoencoder)
    as_it_was(cfg["model"]["autoencoder"])
    cfg = reading_copies(cfg, folder.run, always=True)
    check_files(cfg)
    try:
        model = build_model(cfg, folder.run.path)
    except UserError as error:
        raise _of_a_run(error, folder) from error
    _check_frozen(model, cfg, folder)
    weights = read_weights(folder.path, "model")
    if ema:
        weights |= model.under_all_names(_average(folder))
    model.load_trained_state(weights)
    source = TrainingData(cfg["data"], data or {}, allow, record)
    return Loaded(model.to(device).eval(), cfg, folder, source, record)


def _find_autoencoder(
    cfg: dict[str, Any], run: RunFolder, record: DataRecord | None, moved_to: str | None
) -> None:
    """Writes into `cfg` where the autoencoder lies: below the run, or where the run was started."""
    node = cfg["model"]["autoencoder"]
    if moved_to is not None:
        node["path"] = str(Path(moved_to).expanduser().absolute())
        return
    path = node.get("path")
    if not isinstance(path, str):
        return
    kept = run.kept("autoencoder", "path")
    if kept.is_dir():
        node["path"] = str(kept)
        return
    places = [run.path, Path(record.working_directory)] if record else [run.path]
    with contextlib.suppress(UserError):  # it is reported where it is read
        node["path"] = str(find_folder(path, "autoencoder", [*places, Path()]))


def as_it_was(autoencoder: dict[str, Any]) -> None:
    """Writes into the node of a saved configuration what earlier versions did without a word: they
    knew neither the hash of config.json nor the shift that it may hold.
    """
    if autoencoder.get("_target_") == f"{Autoencoder.__module__}.{Autoencoder.__name__}":
        if SHA256 not in autoencoder:
            autoencoder.setdefault("latent_shift", False)


def _check_frozen(model: LatentDiffusion, cfg: dict[str, Any], folder: CheckpointFolder) -> None:
    """Raises UserError where a frozen part has other weights, or the autoencoder another
    config.json, than the run was trained with.
    """
    said = getattr(model.autoencoder, SHA256, None)
    if said and cfg["model"]["autoencoder"].get(SHA256) not in (None, said):
        raise UserError(
            "holds another config.json than the run was trained with",
            key="autoencoder",
            value=str(model.autoencoder.files[0].parent),
            remedy="Give the folder of the first one in autoencoder.",
        )
    for part, digest in model.frozen_hashes().items():
        trained = cfg["model"][part].get("sha256")
        if trained not in (None, digest):
            raise UserError(
                f"model.{part} has other weights (sha256 {digest[:12]}) than the run in "
                f"{folder.run.path} was trained with ({trained[:12]})",
                key="checkpoint",
                remedy="Restore the files that it reads.",
            )


def _of_a_run(error: UserError, folder: CheckpointFolder) -> UserError:
    """The same error, which names a key of a command that reads a run."""
    if error.key != "model.autoencoder.path":
        return error.within(f"In the configuration of {folder.run.path}")
    return UserError(
        error.problem,
        key="autoencoder",
        value=error.value,
        remedy="Give the folder of the autoencoder that the run was trained with in autoencoder.",
    )


def _average(folder: CheckpointFolder) -> dict[str, torch.Tensor]:
    average = read_weights(folder.path, "ema")
    if average is None:
        raise UserError(
            f"checkpoint={folder.path} has no averaged weights: "
            "it was trained without callbacks.ema",
            key="ema",
            remedy="Set ema=false.",
        )
    return average


def pick_device(accelerator: str) -> str:
    """auto, cpu or gpu to torch's word. UserError where the machine has none."""
    has_gpu = torch.cuda.is_available()
    if accelerator == "gpu" and not has_gpu:
        raise UserError(
            "is not possible: this machine has none",
            key="accelerator",
            value="gpu",
            remedy="Set accelerator=auto.",
        )
    return "cuda" if has_gpu and accelerator != "cpu" else "cpu"
