"""Which checkpoints of a run are whole: each is held against the sizes and hashes in its manifest.
Without torch.
"""

import hashlib
import json
import shutil
from pathlib import Path

from sdtrain.errors import UserError
from sdtrain.runs.layout import CHECKPOINTS, DAMAGED, CheckpointFolder, RunFolder


def sha256_of(path: Path) -> str:
    """Of a file's bytes, as hex."""
    with open(path, "rb") as file:
        if hasattr(hashlib, "file_digest"):
            return hashlib.file_digest(file, "sha256").hexdigest()
        return hashlib.sha256(file.read()).hexdigest()


def write_manifest(folder: Path) -> None:
    """Writes the manifest of the files that are in `folder`. Raises OSError."""
    entries = {}
    for path in sorted(folder.iterdir()):
        entries[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    CheckpointFolder(folder).manifest.write_text(json.dumps(entries, indent=1) + "\n")


def damage(folder: Path) -> str | None:
    """Why `folder` is no whole checkpoint, or None if it is one."""
    checkpoint = CheckpointFolder(folder)
    manifest = checkpoint.manifest.name
    needed = {checkpoint.model.name, checkpoint.trainer.name, checkpoint.config.name}
    try:
        entries = json.loads(checkpoint.manifest.read_text())
        missing = sorted(needed - set(entries))
        if missing:
            return f"{manifest} does not list {missing[0]}"
        for name, wanted in entries.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != wanted["bytes"] or sha256_of(path) != wanted["sha256"]:
                return f"{name} does not agree with {manifest}"
    except FileNotFoundError:
        return f"it has no {manifest}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{manifest} cannot be read ({error})"
    return None


def published(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first, whole or not."""
    folder = RunFolder(run).checkpoints
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.is_dir() and path.name.isdigit()]
    return sorted(found, key=lambda path: CheckpointFolder(path).images_seen)


def newest_whole(run: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a run, and a line for each newer one that was passed over."""
    passed_over = []
    for folder in reversed(published(run)):
        reason = damage(folder)
        if reason is None:
            return folder, passed_over
        passed_over.append(f"{folder} is passed over: {reason}")
    return None, passed_over


def set_aside(checkpoints: list[Path]) -> None:
    """Renames them to NAME.damaged: they no longer count as checkpoints, neither to be found nor to
    be kept.
    """
    for folder in checkpoints:
        aside = folder.with_name(f"{folder.name}{DAMAGED}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)


def find_checkpoint(path: Path) -> Path:
    """The whole checkpoint that `path`, a run or a checkpoint, names. Raises UserError for the key
    checkpoint.
    """
    resolved = path.resolve()  # a name from inside the run leads to the run too
    is_checkpoint = CheckpointFolder(resolved).manifest.is_file()
    if is_checkpoint or resolved.parent.name == CHECKPOINTS:
        reason = damage(resolved)
        if reason:
            raise UserError(
                f"is not whole: {reason}",
                key="checkpoint",
                value=str(path),
                remedy="Give another checkpoint, or the run's folder for its newest whole one.",
            )
        return resolved
    folder, passed_over = newest_whole(resolved)
    if folder is None:
        reason = f"is no run of sdtrain: {CHECKPOINTS}/ with a checkpoint in it is missing"
        if passed_over:
            reason = f"has no whole checkpoint, {passed_over[0]}"
        raise UserError(
            reason,
            key="checkpoint",
            value=str(path),
            remedy="Give the folder of a run, or of one checkpoint, in checkpoint.",
        )
    return folder
