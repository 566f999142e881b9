"""wandb's environment variables: those that stand for a key of `logger`, and those that belong to
one process alone. Without wandb.
"""

import os
from collections.abc import Collection
from typing import Any

from sdtrain.errors import UserError

VARIABLES = {
    "project": "WANDB_PROJECT",
    "entity": "WANDB_ENTITY",
    "group": "WANDB_RUN_GROUP",
    "tags": "WANDB_TAGS",
    "notes": "WANDB_NOTES",
    "job_type": "WANDB_JOB_TYPE",
    "mode": "WANDB_MODE",
}
"""The variable that stands for a key of the logger that was not typed."""

MODES = {
    "online": "online",
    "run": "online",
    "shared": "shared",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
"""What WANDB_MODE may be, and which mode of the logger it means."""

NAME = "WANDB_NAME"
RUN_ID = "WANDB_RUN_ID"
RESUME = "WANDB_RESUME"
FOLDER = "WANDB_DIR"
"""Variables that no key stands for."""

OF_ONE_RUN = (
    RUN_ID,
    RESUME,
    "WANDB_RESUME_FROM",
    "WANDB_FORK_FROM",
    "WANDB_SWEEP_ID",
    "WANDB_SWEEP_PARAM_PATH",
)
"""What says which run of wandb a process writes: with it a first stage and all arms of a sweep
would write to the same one."""

TO_ANOTHER_MACHINE = (NAME, *VARIABLES.values())
"""What an arm that is started by ssh is told too."""


def with_variables(node: dict[str, Any], typed: Collection[str]) -> dict[str, Any]:
    """The logger's node with what the environment says of keys that were not typed.

    Raises UserError for a mode that wandb does not have.
    """
    settled = dict(node)
    for key, variable in VARIABLES.items():
        value = os.environ.get(variable)
        if not value or f"logger.{key}" in typed:
            continue
        if key == "mode":
            settled[key] = _mode(value)
        elif key == "tags":
            settled[key] = [tag.strip() for tag in value.split(",") if tag.strip()]
        else:
            settled[key] = value
    return settled


def _mode(value: str) -> str:
    if value not in MODES:
        raise UserError(
            f"{VARIABLES['mode']}={value} is no mode of wandb",
            key="logger.mode",
            allowed=", ".join(MODES),
            remedy=f"Unset {VARIABLES['mode']}, or type logger.mode.",
        )
    return MODES[value]


def forget_wandb_run(environment: dict[str, str], name: str) -> None:
    """Makes the run of a process that gets `environment` one of its own to wandb.

    name: what is added to WANDB_NAME, where that is set.
    """
    for variable in OF_ONE_RUN:
        environment.pop(variable, None)
    if environment.get(NAME):
        environment[NAME] += f"/{name}"
