"""The checkpoint folder: written beside, flushed, renamed; read back only if its manifest agrees
(runs/manifest.py).

    checkpoints/<images_seen>/  model.safetensors  ema.safetensors  trainer.pt  config.yaml
    manifest.json

Plain tensors and text; trainer.pt is read with weights_only=True, so nothing is ever unpickled.
"""

import errno
import shutil
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdtrain.errors import StorageError
from sdtrain.files import atomic_folder
from sdtrain.runs.config import unreadable
from sdtrain.runs.layout import CheckpointFolder
from sdtrain.runs.manifest import write_manifest

MEBIBYTE = 2**20


def snapshot(state):
    """A copy in the CPU's memory of everything in nested dicts and lists: what is trained on
    meanwhile does not change it.
    """
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: snapshot(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(snapshot(value) for value in state)
    return state


def size_of(state) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(size_of(value) for value in state.values())
    if isinstance(state, list | tuple):
        return sum(size_of(value) for value in state)
    return 0


def not_finite(tensors: dict[str, Tensor]) -> str | None:
    """The name of a tensor that holds NaN or infinity."""
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            return name
    return None


def write_checkpoint(
    folder: Path,
    model: dict[str, Tensor],
    ema: dict[str, Tensor] | None,
    trainer: dict,
    config: str,
) -> None:
    """Publishes one checkpoint at `folder`. Raises StorageError where the disk refuses; then
    nothing of it is left.

    model and ema: parameters and buffers by name; trainer: plain state for an exact resume; config:
    the run's yaml.
    """
    try:
        with atomic_folder(folder) as beside:
            _check_room(beside, size_of([model, ema, trainer]) + MEBIBYTE)
            files = CheckpointFolder(beside)
            _save_tensors(model, files.model)
            if ema is not None:
                _save_tensors(ema, files.ema)
            _save_state(trainer, files.trainer)
            files.config.write_text(config, encoding="utf-8")
            write_manifest(beside)
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"The checkpoint {folder} cannot be written: {error}",
            key="hydra.run.dir",
            remedy="Free space or set hydra.run.dir to another place.",
        ) from error


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        sizes = f"it takes {needed / MEBIBYTE:.0f} MiB and {free / MEBIBYTE:.0f} MiB are free"
        raise OSError(errno.ENOSPC, sizes)


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes each under its name. A tied weight, which has several names, is written for each."""
    separate = {}
    storages = set()
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        if storage in storages:
            value = value.clone()  # safetensors refuses tensors that share memory
        storages.add(storage)
        separate[name] = value
    save_file(separate, path)


def _save_state(state: dict, path: Path) -> None:
    try:
        torch.save(state, path)
    except RuntimeError as error:
        raise OSError(str(error)) from error  # torch's way to say that the disk refuses


def read_trainer(folder: Path) -> dict:
    """The state in trainer.pt. Raises StorageError where it holds anything but plain values and
    tensors.
    """
    path = CheckpointFolder(folder).trainer
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise unreadable(path, error) from error


def read_weights(folder: Path, name: str) -> dict[str, Tensor] | None:
    """The tensors of model.safetensors or ema.safetensors (name: "model" or "ema"), None if there
    is no such file.

    Raises StorageError where it is something else.
    """
    path = getattr(CheckpointFolder(folder), name)
    try:
        return load_file(path) if path.is_file() else None
    except SafetensorError as error:
        raise unreadable(path, error) from error
