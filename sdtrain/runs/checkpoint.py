"""Write and read the folder of a checkpoint.

    checkpoints/<images_seen>/  model.safetensors  ema.safetensors  trainer.pt  config.yaml
    manifest.json

It is written under a temporary name, flushed and renamed. It is only read if its files agree with
its manifest (runs/manifest.py). It holds plain tensors and text; trainer.pt is read with
weights_only=True, so nothing is ever unpickled.
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
from sdtrain.runs.config import unreadable_error
from sdtrain.runs.layout import CheckpointFolder
from sdtrain.runs.manifest import write_manifest

MEBIBYTE = 2**20


def snapshot(state):
    """Return a copy in which all tensors of nested dicts and lists are on the CPU, so that further
    training does not change it.
    """
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: snapshot(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(snapshot(value) for value in state)
    return state


def tensor_bytes(state) -> int:
    """Return the size of all tensors in nested dicts and lists, in bytes."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(map(tensor_bytes, state.values()))
    if isinstance(state, list | tuple):
        return sum(map(tensor_bytes, state))
    return 0


def find_non_finite(tensors: dict[str, Tensor]) -> str | None:
    """Return the name of the first tensor that contains NaN or infinity, or None."""
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
    """Write a checkpoint to `folder`, atomically.

    Raises StorageError if it cannot be written; then no part of it remains.

    Args:
        folder: of the new checkpoint.
        model: parameters and buffers by name.
        ema: their moving averages by name, None if there are none.
        trainer: everything else that an exact resume needs, as plain values and tensors.
        config: the yaml of the run.
    """
    try:
        with atomic_folder(folder) as temporary:
            _check_free_space(temporary, tensor_bytes([model, ema, trainer]) + MEBIBYTE)
            files = CheckpointFolder(temporary)
            _save_tensors(model, files.model)
            if ema is not None:
                _save_tensors(ema, files.ema)
            _save_state(trainer, files.trainer)
            files.config.write_text(config, encoding="utf-8")
            write_manifest(temporary)
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"The checkpoint {folder} cannot be written: {error}",
            key="hydra.run.dir",
            remedy="Free space or set hydra.run.dir to another place.",
        ) from error


def _check_free_space(folder: Path, needed: int) -> None:
    """Raise OSError if the disk has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        sizes = f"it takes {needed / MEBIBYTE:.0f} MiB and {free / MEBIBYTE:.0f} MiB are free"
        raise OSError(errno.ENOSPC, sizes)


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Save each tensor under its name; a tied weight, which has several names, under each."""
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
        raise OSError(str(error)) from error  # torch raises RuntimeError if the disk is full


def read_trainer(folder: Path) -> dict:
    """Return the state in trainer.pt.

    Raises StorageError if the file holds anything but plain values and tensors.
    """
    path = CheckpointFolder(folder).trainer
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise unreadable_error(path, error) from error


def read_weights(folder: Path, name: str) -> dict[str, Tensor] | None:
    """Return the tensors of model.safetensors or ema.safetensors; None if there is no such file.

    Raises StorageError if the file is not a safetensors file.

    Args:
        folder: of the checkpoint.
        name: "model" or "ema".
    """
    path = getattr(CheckpointFolder(folder), name)
    try:
        return load_file(path) if path.is_file() else None
    except SafetensorError as error:
        raise unreadable_error(path, error) from error
