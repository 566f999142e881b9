"""wandb's environment variables: those that replace a key of `logger`, and those that must not be
passed on to other runs. Does not import wandb.
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
"""{key of the logger: the variable that replaces it unless the key was typed}."""

MODES = {
    "online": "online",
    "run": "online",
    "shared": "shared",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
"""{value of WANDB_MODE: mode of the logger}."""

NAME = "WANDB_NAME"
RUN_ID = "WANDB_RUN_ID"
RESUME = "WANDB_RESUME"
FOLDER = "WANDB_DIR"
"""Variables without a key of the logger."""

RUN_VARIABLES = (
    RUN_ID,
    RESUME,
    "WANDB_RESUME_FROM",
    "WANDB_FORK_FROM",
    "WANDB_SWEEP_ID",
    "WANDB_SWEEP_PARAM_PATH",
)
"""Variables that select the wandb run. If a first stage or the arms of a sweep inherited them, all
would write to the same run."""

SSH_VARIABLES = (NAME, *VARIABLES.values())
"""Variables that are also passed to an arm that is started by ssh."""


def with_variables(node: dict[str, Any], typed: Collection[str]) -> dict[str, Any]:
    """Return the logger's node with the environment's values for keys that were not typed.

    Raises UserError for a WANDB_MODE that wandb does not have.
    """
    settings = dict(node)
    for key, variable in VARIABLES.items():
        value = os.environ.get(variable)
        if not value or f"logger.{key}" in typed:
            continue
        if key == "mode":
            settings[key] = _mode(value)
        elif key == "tags":
            settings[key] = [tag.strip() for tag in value.split(",") if tag.strip()]
        else:
            settings[key] = value
    return settings


def _mode(value: str) -> str:
    if value not in MODES:
        raise UserError(
            f"{VARIABLES['mode']}={value} is not a mode of wandb",
            key="logger.mode",
            allowed=", ".join(MODES),
            remedy=f"Unset {VARIABLES['mode']}, or set logger.mode on the command line.",
        )
    return MODES[value]


def forget_wandb_run(environment: dict[str, str], name: str) -> None:
    """Change `environment` so that the process that gets it starts a wandb run of its own.

    name: added to WANDB_NAME, if that is set.
    """
    for variable in RUN_VARIABLES:
        environment.pop(variable, None)
    if environment.get(NAME):
        environment[NAME] += f"/{name}"
