"""Arms that differ only in how their pictures are drawn share one training."""

import json
import shutil
from collections.abc import Iterable

from sdtrain.files import atomic_folder, write_text
from sdtrain.runs.layout import CheckpointFolder
from sdtrain.runs.manifest import newest_whole, published
from sdtrain.sweep.arms import Arm

DRAWING = ("sampler", "grid", "guidance", "steps", "guidance_scale")
"""Keys and groups that no weight depends on."""


def trained_by(arms: Iterable[Arm]) -> dict[str, Arm]:
    """{name of an arm: the earlier one whose training it shares}.

    Where a time ends a run each is trained alone: one that goes on would train for that time again.
    """
    first_of: dict[str, Arm] = {}
    shared = {}
    for arm in arms:
        if arm.config["trainer"]["max_minutes"] is not None:
            continue
        rest = {key: value for key, value in arm.config.items() if key not in DRAWING}
        first = first_of.setdefault(json.dumps(rest, sort_keys=True), arm)
        if first is not arm:
            shared[arm.name] = first
    return shared


def hand_over(first: Arm, arm: Arm) -> None:
    """Gives the arm the last weights of a finished one, from which it goes on to its own looks.

    An arm that has weights keeps them. Raises OSError.
    """
    if published(arm.run.path):
        return
    newest, _ = newest_whole(first.run.path)
    if newest is None:
        return
    seen = CheckpointFolder(newest).images_seen
    with atomic_folder(arm.run.checkpoint(seen).path) as beside:
        for file in sorted(newest.iterdir()):
            shutil.copyfile(file, beside / file.name)
    write_text(arm.run.trained_by, f"{first.name}\n")
