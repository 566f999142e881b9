"""The checkpoint folder: written beside, fsynced, renamed; read back only if its manifest agrees.

    checkpoints/<images_seen>/  model.safetensors  ema.safetensors  trainer.pt  config.yaml  manifest.json (sha256 of the others)

Plain tensors and text; trainer.pt is read with weights_only=True, so nothing is ever unpickled.
"""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from pickle import UnpicklingError

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from yaml import YAMLError

from sdtrain.errors import StorageError, UserError

MANIFEST = "manifest.json"
NEEDED = {"model.safetensors", "trainer.pt", "config.yaml"}


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else hashlib.sha256(file.read()).hexdigest()
        )


def snapshot(state):
    """A copy in the CPU's memory of everything in nested dicts and lists: what is trained on meanwhile does not change it."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: snapshot(value) for key, value in state.items()}
    return (
        type(state)(snapshot(value) for value in state)
        if isinstance(state, list | tuple)
        else state
    )


def size_of(state) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    values = (
        state.values()
        if isinstance(state, dict)
        else state
        if isinstance(state, list | tuple)
        else ()
    )
    return sum(map(size_of, values))


def not_finite(tensors: dict[str, Tensor]) -> str | None:
    """The name of a tensor that holds NaN or infinity."""
    return next(
        (
            name
            for name, value in tensors.items()
            if value.is_floating_point() and not bool(value.isfinite().all())
        ),
        None,
    )


def write_checkpoint(
    folder: Path,
    model: dict[str, Tensor],
    ema: dict[str, Tensor] | None,
    trainer: dict,
    config: str,
) -> None:
    """Publishes one checkpoint at `folder`. Raises StorageError where the disk refuses; then nothing but a hidden .tmp folder is left.

    model and ema: parameters and buffers by name; trainer: plain state for an exact resume; config: the run's yaml.
    """
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        needed, free = size_of([model, ema, trainer]) + 2**20, shutil.disk_usage(beside).free
        if free < needed:
            raise OSError(
                errno.ENOSPC,
                f"it takes {needed / 2**20:.0f} MiB and {free / 2**20:.0f} MiB are free",
            )
        for name, tensors in {"model": model, "ema": ema}.items():
            if tensors is not None:
                save_file(
                    {k: v.detach().cpu().contiguous() for k, v in tensors.items()},
                    beside / f"{name}.safetensors",
                )
        torch.save(trainer, beside / "trainer.pt")
        (beside / "config.yaml").write_text(config, encoding="utf-8")
        files = sorted(beside.iterdir())
        manifest = {
            path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files
        }
        (beside / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        for path in [*files, beside / MANIFEST, beside]:
            fsync(path)
        if (
            folder.exists()
        ):  # a folder cannot be renamed onto one that has files: the old one steps aside first
            old = folder.with_name(f".{folder.name}.old.tmp")
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
            beside.rename(folder)
            shutil.rmtree(old)
        else:
            beside.rename(folder)
        fsync(folder.parent)
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as error:  # torch and safetensors have their own words for a full disk
        shutil.rmtree(beside, ignore_errors=True)
        raise StorageError(
            f"The checkpoint {folder} cannot be written: {error}. Free space or set hydra.run.dir to another place."
        ) from error


def damage(folder: Path) -> str | None:
    """Why `folder` is no whole checkpoint, or None if it is one."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if missing := NEEDED - set(manifest):
            return f"{MANIFEST} does not list {sorted(missing)[0]}"
        for name, wanted in manifest.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if (folder / name).stat().st_size != wanted["bytes"] or _sha256(
                folder / name
            ) != wanted["sha256"]:
                return f"{name} does not agree with {MANIFEST}"
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return None


def published(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first, whole or not."""
    if not (run / "checkpoints").is_dir():
        return []
    return sorted(
        (p for p in (run / "checkpoints").iterdir() if p.is_dir() and p.name.isdigit()),
        key=lambda p: int(p.name),
    )


def newest_whole(run: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a run, and one line for each newer one that was passed over."""
    passed_over = []
    for folder in reversed(published(run)):
        if (reason := damage(folder)) is None:
            return folder, passed_over
        passed_over.append(f"{folder} is passed over: {reason}")
    return None, passed_over


def set_aside(damaged: list[Path]) -> None:
    """Renames them to NAME.damaged: they no longer count as checkpoints, neither to be found nor to be kept in place of good ones."""
    for folder in damaged:
        shutil.rmtree(folder.with_name(f"{folder.name}.damaged"), ignore_errors=True)
        folder.rename(folder.with_name(f"{folder.name}.damaged"))


def find_checkpoint(path: Path) -> Path:
    """The whole checkpoint that `path`, a run or a checkpoint, names. Raises UserError naming the key checkpoint."""
    said, path = (
        path,
        path.expanduser().resolve(),
    )  # resolved: a name from inside the run leads to the run too
    if (path / MANIFEST).is_file() or path.parent.name == "checkpoints":
        if reason := damage(path):
            raise UserError(
                f"checkpoint={said} is not whole: {reason}. Give another checkpoint, or the run's folder for its newest whole one."
            )
        return path
    folder, passed_over = newest_whole(path)
    if folder is None:
        reason = (
            f"no whole checkpoint, {passed_over[0]}"
            if passed_over
            else "it is no run of sdtrain: checkpoints/ with a checkpoint in it is missing"
        )
        raise UserError(
            f"checkpoint={said}: {reason}. Give the folder of a run, or of one checkpoint, in checkpoint."
        )
    return folder


def unreadable(path: Path, error: Exception) -> StorageError:
    said = str(error).strip().partition("\n")[0] or type(error).__name__
    return StorageError(
        f"{path} is not what sdtrain writes, and is not read: {said[:300]}. Give another checkpoint, or remove this one."
    )


def read_trainer(folder: Path) -> dict:
    """The state in trainer.pt. Raises StorageError where it holds anything but plain values and tensors."""
    try:
        return torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise unreadable(folder / "trainer.pt", error) from error


def read_weights(folder: Path, name: str) -> dict[str, Tensor] | None:
    """The tensors of model.safetensors or ema.safetensors, None if the checkpoint has no such file. Raises StorageError where it is something else."""
    path = folder / f"{name}.safetensors"
    try:
        return load_file(path) if path.is_file() else None
    except SafetensorError as error:
        raise unreadable(path, error) from error


def read_config(folder: Path) -> dict:
    """The configuration in config.yaml, nothing of it resolved. Raises StorageError where it is no plain mapping."""
    try:
        return dict(OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")))
    except (YAMLError, OmegaConfBaseException, OSError, ValueError, TypeError) as error:
        raise unreadable(folder / "config.yaml", error) from error


def write_text(path: Path, text: str) -> None:
    """Writes a small text file beside and renames it: a reader never sees half of it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(text, encoding="utf-8")
        fsync(beside)
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
