"""Arms that differ only in how they sample are trained once.

The first of them is trained. The others copy its last checkpoint and only draw their samples.
"""

import json
import shutil
from collections.abc import Iterable

from sdtrain.files import atomic_folder, write_text
from sdtrain.runs.layout import CheckpointFolder
from sdtrain.runs.manifest import list_checkpoints, newest_intact
from sdtrain.sweep.arms import Arm

SAMPLING_KEYS = ("sampler", "grid", "guidance", "steps", "guidance_scale")
"""Keys and groups that do not affect the weights."""


def find_shared_training(arms: Iterable[Arm]) -> dict[str, Arm]:
    """Return {name of an arm: the earlier arm whose training it shares}.

    An arm with a time limit (trainer.max_minutes) is always trained alone: resumed from the copied
    checkpoint, it would train for that time again.
    """
    first_with: dict[str, Arm] = {}
    shared = {}
    for arm in arms:
        if arm.config["trainer"]["max_minutes"] is not None:
            continue
        training = {key: value for key, value in arm.config.items() if key not in SAMPLING_KEYS}
        first = first_with.setdefault(json.dumps(training, sort_keys=True), arm)
        if first is not arm:
            shared[arm.name] = first
    return shared


def copy_newest_checkpoint(first: Arm, arm: Arm) -> None:
    """Copy the newest intact checkpoint of `first`, which has finished, to the run of `arm`.

    `arm` resumes from it and draws its own samples. Does nothing if `arm` has a checkpoint already.
    Raises OSError.
    """
    if list_checkpoints(arm.run.path):
        return
    newest, _ = newest_intact(first.run.path)
    if newest is None:
        return
    images_seen = CheckpointFolder(newest).images_seen
    with atomic_folder(arm.run.checkpoint(images_seen).path) as unpublished:
        for file in sorted(newest.iterdir()):
            shutil.copyfile(file, unpublished / file.name)
    write_text(arm.run.trained_by, f"{first.name}\n")
