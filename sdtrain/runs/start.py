"""Decide whether a run may start in a folder, given what the folder contains. Needs no torch."""

from typing import Literal

from sdtrain.errors import StorageError, UserError
from sdtrain.runs.layout import RunFolder
from sdtrain.runs.manifest import list_checkpoints

Resume = Literal["never", "auto", "must"]


def check_start(run: RunFolder, resume: Resume, has_first_stage: bool) -> None:
    """Raise UserError if the folder holds a run that must not be resumed, or none to resume.

    Args:
        run: the folder of the run.
        resume: the key of that name.
        has_first_stage: whether the run trains its autoencoder first, and may have been stopped
            there.
    """
    has_checkpoints = bool(list_checkpoints(run.path))
    if resume == "never" and has_checkpoints:
        raise UserError(
            f"{run.path} already holds a run",
            key="resume",
            remedy="Set resume=auto to resume it, or set another hydra.run.dir.",
        )
    if resume != "must" or has_checkpoints:
        return
    if not has_first_stage or not list_checkpoints(run.first_stage.path):
        raise nothing_to_resume_error(run, resume)


def nothing_to_resume_error(run: RunFolder, resume: Resume) -> UserError:
    """Return the error to raise if the run has no intact checkpoint."""
    count = len(list_checkpoints(run.path))
    if count:
        return StorageError(
            f"resume={resume}, but none of the {count} checkpoints in {run.path} is intact",
            key="hydra.run.dir",
            remedy="Restore one, or set another hydra.run.dir.",
        )
    return UserError(
        f"resume={resume}, but there is no checkpoint in {run.path}",
        key="resume",
        remedy="Set hydra.run.dir to the run, or set resume=auto to start from the beginning.",
    )
