"""Find the intact checkpoints of a run, whose files have the sizes and hashes in the manifest.

Needs no torch.
"""

import json
import shutil
from pathlib import Path

from sdtrain.errors import UserError
from sdtrain.files import sha256_of
from sdtrain.runs.layout import CHECKPOINTS, DAMAGED, CheckpointFolder, RunFolder


def write_manifest(folder: Path) -> None:
    """Write the manifest of the files in `folder`. Raises OSError."""
    entries = {}
    for path in sorted(folder.iterdir()):
        entries[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    CheckpointFolder(folder).manifest.write_text(json.dumps(entries, indent=1) + "\n")


def find_damage(folder: Path) -> str | None:
    """Return why `folder` is not an intact checkpoint, or None if it is one."""
    checkpoint = CheckpointFolder(folder)
    manifest = checkpoint.manifest.name
    required = {checkpoint.model.name, checkpoint.trainer.name, checkpoint.config.name}
    try:
        entries = json.loads(checkpoint.manifest.read_text())
        missing = sorted(required - set(entries))
        if missing:
            return f"{manifest} does not list {missing[0]}"
        for name, entry in entries.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"] or sha256_of(path) != entry["sha256"]:
                return f"{name} does not agree with {manifest}"
    except FileNotFoundError:
        return f"it has no {manifest}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{manifest} cannot be read ({error})"
    return None


def list_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first, intact or not."""
    folder = RunFolder(run).checkpoints
    if not folder.is_dir():
        return []
    checkpoints = [path for path in folder.iterdir() if path.is_dir() and path.name.isdigit()]
    return sorted(checkpoints, key=lambda path: CheckpointFolder(path).images_seen)


def newest_intact(run: Path) -> tuple[Path | None, list[str]]:
    """Return the newest intact checkpoint of a run, and a line about each newer damaged one."""
    warnings = []
    for folder in reversed(list_checkpoints(run)):
        damage = find_damage(folder)
        if damage is None:
            return folder, warnings
        warnings.append(f"{folder} is skipped: {damage}")
    return None, warnings


def mark_damaged(checkpoints: list[Path]) -> None:
    """Rename the folders to NAME.damaged, so that they no longer count as checkpoints."""
    for folder in checkpoints:
        renamed = folder.with_name(f"{folder.name}{DAMAGED}")
        shutil.rmtree(renamed, ignore_errors=True)
        folder.rename(renamed)


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint at `path`, or the newest intact one of the run at `path`.

    Raises UserError for the key `checkpoint` if there is none or it is damaged.
    """
    resolved = path.resolve()  # "." inside a run's folder should name the run too
    is_checkpoint = CheckpointFolder(resolved).manifest.is_file()
    if is_checkpoint or resolved.parent.name == CHECKPOINTS:
        damage = find_damage(resolved)
        if damage:
            raise UserError(
                f"is damaged: {damage}",
                key="checkpoint",
                value=str(path),
                remedy="Give another checkpoint, or the run's folder for its newest intact one.",
            )
        return resolved
    folder, warnings = newest_intact(resolved)
    if folder is None:
        problem = f"is not a run of sdtrain: {CHECKPOINTS}/ with a checkpoint in it is missing"
        if warnings:
            problem = f"has no intact checkpoint: {warnings[0]}"
        raise UserError(
            problem,
            key="checkpoint",
            value=str(path),
            remedy="Set checkpoint to the folder of a run or of one checkpoint.",
        )
    return folder
