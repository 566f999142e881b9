"""Load a trained model from a checkpoint of a run.

Every class that its configuration names is checked before anything is imported.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sdtrain.assemble.kept_files import SHA256, check_files, use_copies
from sdtrain.assemble.model import build_model
from sdtrain.assemble.training_data import TrainingData
from sdtrain.config.optimizers import is_schedule_free
from sdtrain.config.precheck import is_autoencoder
from sdtrain.config.trusted import check_targets, upgrade_config
from sdtrain.console import warn
from sdtrain.errors import StorageError, UserError
from sdtrain.latent_diffusion import LatentDiffusion
from sdtrain.models.autoencoder import Autoencoder
from sdtrain.models.hub import find_pipeline
from sdtrain.models.pipeline_folder import TEXT_ENCODER, UNET, VAE
from sdtrain.paths import HUB_ID, find_folder
from sdtrain.runs.checkpoint import read_weights
from sdtrain.runs.config import read_config
from sdtrain.runs.data_record import DataRecord, read_data_record
from sdtrain.runs.layout import CheckpointFolder, RunFolder

BUILT = (
    "model",
    "adapter",
    "schedule",
    "modifiers",
    "prediction",
    "weighting",
    "loss",
    "times",
)
"""Sections of a checkpoint's configuration that are built, beside the data set."""

FROZEN_FOLDERS = {"unet": UNET, "conditioner": TEXT_ENCODER, "autoencoder": VAE}
"""{part that may be frozen in a model with model.pretrained: its subfolder of the pipeline}."""

PLAIN_KEYS = ("seed", "guidance_scale")
"""Plain values that are read from it."""


@dataclass
class LoadedCheckpoint:
    """A trained model with the requested weights, and its configuration.

    checkpoint: the folder that the weights were read from. training_data: builds the data set that
    the model was trained on. record: what the run recorded about that data set; None for a run of
    an earlier version.
    """

    model: LatentDiffusion
    cfg: dict[str, Any]
    checkpoint: CheckpointFolder
    training_data: TrainingData
    record: DataRecord | None

    @property
    def image_size(self) -> int:
        """Side of the pictures in pixels."""
        if self.record is not None:
            return self.record.image_size
        return self.cfg["data"].get("image_size") or self.training_data.data.image_size


def load(
    folder: CheckpointFolder,
    *,
    ema: bool,
    device: str,
    allow: list[str],
    autoencoder: str | None = None,
    pretrained: str | None = None,
    keep_frozen_dtype: bool = True,
    data: dict[str, Any] | None = None,
) -> LoadedCheckpoint:
    """Load the model of a complete checkpoint, see `find_checkpoint`.

    Neither the pictures nor the class of the data set are accessed before they are needed.

    Args:
        folder: the checkpoint.
        ema: whether to load the averaged weights.
        device: to move the model to.
        allow: packages whose classes the configuration may build.
        autoencoder: the new folder of the autoencoder, if it has moved.
        pretrained: the new folder of the pretrained pipeline, if it has moved.
        keep_frozen_dtype: False reads frozen parts in full precision, even if the run did not.
        data: changes to the arguments of the data set.

    Raises UserError if the checkpoint holds no diffusion model or cannot be loaded.
    """
    saved = upgrade_config(read_config(folder.config))
    _check_is_diffusion(saved, folder)
    _check_has_raw_weights(saved, ema)
    check_targets({key: saved.get(key) for key in BUILT}, allow)
    cfg = {key: value for key, value in saved.items() if key in (*BUILT, *PLAIN_KEYS)}
    cfg["data"] = saved.get("data") or {}
    record = read_data_record(folder.run)
    _set_autoencoder_path(cfg, folder.run, record, autoencoder)
    restore_old_defaults(cfg["model"]["autoencoder"])
    cfg = use_copies(cfg, folder.run, always=True)
    has_adapter = bool(saved.get("adapter"))
    _set_pretrained(cfg["model"], folder.run, pretrained, has_adapter=has_adapter)
    if not keep_frozen_dtype:
        if "frozen_dtype" in cfg["model"]:
            cfg["model"]["frozen_dtype"] = None
        for part in LatentDiffusion.PARTS:
            if "dtype" in cfg["model"][part]:
                cfg["model"][part]["dtype"] = None
    check_files(cfg)
    try:
        model = build_model(cfg, folder.run.path)
    except UserError as error:
        raise _with_key_of_command(error, folder) from error
    _check_frozen(model, cfg, folder)
    weights = read_weights(folder.path, "model")
    if ema and not is_schedule_free(saved):  # whose weights are averages already
        weights |= model.add_tied_names(_read_average(folder))
    model.load_trained_state(weights)
    training_data = TrainingData(cfg["data"], data or {}, allow, record)
    return LoadedCheckpoint(model.to(device).eval(), cfg, folder, training_data, record)


def _check_has_raw_weights(saved: dict[str, Any], ema: bool) -> None:
    """Raise UserError if the raw weights are asked for and the checkpoint holds only averages."""
    if is_schedule_free(saved) and not ema:
        raise UserError(
            "has no raw weights to show: with optimizer=schedule_free those of a checkpoint are "
            "averages",
            key="ema",
            value="false",
            remedy="Remove it.",
        )


def _check_is_diffusion(saved: dict[str, Any], folder: CheckpointFolder) -> None:
    """Raise an error if a saved configuration is not that of a diffusion model."""
    remedy = "Give the run of a diffusion model in checkpoint."
    if is_autoencoder(saved):
        raise UserError(
            "is the run of an autoencoder, which generates no pictures by itself",
            key="checkpoint",
            value=str(folder.path),
            remedy=remedy,
        )
    for key in ("model", "schedule"):
        if not saved.get(key):
            raise StorageError(
                f"{folder.config} has no {key}: it does not belong to a diffusion model",
                key="checkpoint",
                remedy=remedy,
            )


def _set_autoencoder_path(
    cfg: dict[str, Any], run: RunFolder, record: DataRecord | None, moved_to: str | None
) -> None:
    """Set the autoencoder's path in `cfg`.

    It is `moved_to` if given, or else the run's copy, or else found in the run's folder, the folder
    where the run was started, or the working directory.
    """
    node = cfg["model"]["autoencoder"]
    if moved_to is not None:
        node["path"] = str(Path(moved_to).expanduser().absolute())
        return
    path = node.get("path")
    if not isinstance(path, str):
        return
    kept = run.kept_files("autoencoder", "path")
    if kept.is_dir():
        node["path"] = str(kept)
        return
    places = [run.path]
    if record:
        places.append(Path(record.working_directory))
    with contextlib.suppress(UserError):  # a missing folder is reported when it is read
        node["path"] = str(find_folder(path, "autoencoder", [*places, Path()]))


def _set_pretrained(
    model: dict[str, Any], run: RunFolder, moved_to: str | None, *, has_adapter: bool
) -> None:
    """Set from where the weights of a run with model.pretrained are read.

    Trained weights are in the checkpoint, and those of the folder are not read. The folder of
    frozen weights is below `moved_to`, if that is given: a folder, a single file or a hub id.
    """
    if model.get("pretrained") is None:
        if moved_to is not None:
            warn("model.pretrained has no effect: the run uses no pretrained weights.")
        return
    frozen = {}
    if has_adapter:
        frozen["unet"] = "weights"
    else:
        model["unet"]["weights"] = None
        if TEXT_ENCODER in model["train"]:
            model["conditioner"]["weights"] = None
    if model["conditioner"].get("weights") is not None:
        frozen["conditioner"] = "weights"
    if not run.kept_files("autoencoder", "path").is_dir():
        frozen["autoencoder"] = "path"
    recorded = [model[part][key] for part, key in frozen.items()]
    folder = _found_again(model, moved_to, recorded)
    if folder is not None:
        for part, key in frozen.items():
            model[part][key] = str(folder / FROZEN_FOLDERS[part])


def _found_again(model: dict[str, Any], moved_to: str | None, recorded: list[str]) -> Path | None:
    """Return the pipeline whose frozen weights replace the recorded ones, or None if those are
    read.

    recorded: folders of frozen weights. Those of a single file and of a repository of the hub are
    in a cache, from which they may be gone.
    """
    source = model["pretrained"] if moved_to is None else moved_to
    if Path(source).is_file():
        return find_pipeline(source, None, None)
    if moved_to is None:
        is_in_place = all(Path(folder).is_dir() for folder in recorded)
        if is_in_place or not HUB_ID.fullmatch(source):
            return None
    revision = model["revision"] if source == model["pretrained"] else None
    return find_pipeline(source, revision, model["variant"])


def restore_old_defaults(autoencoder: dict[str, Any]) -> None:
    """Set what earlier versions implied in the `autoencoder` node of a saved configuration.

    They recorded no hash of the autoencoder's config.json, and ignored the shift in it.
    """
    if autoencoder.get("_target_") == f"{Autoencoder.__module__}.{Autoencoder.__name__}":
        if SHA256 not in autoencoder:
            autoencoder.setdefault("latent_shift", False)


def _check_frozen(model: LatentDiffusion, cfg: dict[str, Any], folder: CheckpointFolder) -> None:
    """Raise UserError if the files of a frozen part have changed since the run was trained.

    These are the weights of each frozen part, and the autoencoder's config.json.
    """
    config_hash = getattr(model.autoencoder, SHA256, None)
    if config_hash and cfg["model"]["autoencoder"].get(SHA256) not in (None, config_hash):
        raise UserError(
            "contains another config.json than the run was trained with",
            key="autoencoder",
            value=str(model.autoencoder.files[0].parent),
            remedy="Give the folder of the original one in autoencoder.",
        )
    for part, digest in model.frozen_hashes().items():
        trained = cfg["model"][part].get("sha256")
        if trained not in (None, digest):
            raise UserError(
                f"model.{part} has other weights (sha256 {digest[:12]}) than the run in "
                f"{folder.run.path} was trained with ({trained[:12]})",
                key="model.pretrained" if cfg["model"].get("pretrained") else "checkpoint",
                remedy="Set model.pretrained to the pipeline that the run was trained with."
                if cfg["model"].get("pretrained")
                else f"Restore the files that model.{part} reads.",
            )


def _with_key_of_command(error: UserError, folder: CheckpointFolder) -> UserError:
    """Return the error with a key that the command has, which reads a run instead of training."""
    if error.key in ("model.conditioner.weights", "model.unet.weights"):
        return UserError(
            error.problem,
            key="model.pretrained",
            value=error.value,
            remedy="Set model.pretrained to the folder of the pipeline that the run was trained "
            "with.",
        )
    if error.key != "model.autoencoder.path":
        return error.with_prefix(f"In the configuration of {folder.run.path}")
    return UserError(
        error.problem,
        key="autoencoder",
        value=error.value,
        remedy="Give the folder of the autoencoder that the run was trained with in autoencoder.",
    )


def _read_average(folder: CheckpointFolder) -> dict[str, torch.Tensor]:
    """Read the averaged weights. Raises UserError if there are none."""
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
    """Return torch's device for "auto", "cpu" or "gpu". UserError if "gpu" is not available."""
    has_gpu = torch.cuda.is_available()
    if accelerator == "gpu" and not has_gpu:
        raise UserError(
            "is not possible: this machine has no GPU that torch can use",
            key="accelerator",
            value="gpu",
            remedy="Set accelerator=auto.",
        )
    return "cuda" if has_gpu and accelerator != "cpu" else "cpu"
