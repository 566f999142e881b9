"""Whether a run may begin in a folder, by what lies there. Without torch."""

from typing import Literal

from sdtrain.errors import StorageError, UserError
from sdtrain.runs.layout import RunFolder
from sdtrain.runs.manifest import published

Resume = Literal["never", "auto", "must"]


def check_start(run: RunFolder, resume: Resume, has_first_stage: bool) -> None:
    """Raises UserError where another run lies in the folder, or where there is none to go on with.

    has_first_stage: whether the run trains its autoencoder first, and may have been stopped there.
    """
    begun = published(run.path)
    if resume == "never" and begun:
        raise UserError(
            f"{run.path} already holds a run",
            key="resume",
            remedy="Set resume=auto to go on with it, or another hydra.run.dir.",
        )
    first_stage_begun = has_first_stage and published(run.first_stage.path)
    if resume == "must" and not begun and not first_stage_begun:
        raise nothing_to_resume(run, resume)


def nothing_to_resume(run: RunFolder, resume: Resume) -> UserError:
    """Why there is no checkpoint to go on from."""
    count = len(published(run.path))
    if count:
        return StorageError(
            f"resume={resume}, but none of the {count} checkpoints in {run.path} is whole",
            key="hydra.run.dir",
            remedy="Restore one, or set another hydra.run.dir.",
        )
    return UserError(
        f"resume={resume}, but there is no whole checkpoint in {run.path}",
        key="resume",
        remedy="Set hydra.run.dir to the run, or resume=auto to start anew.",
    )
