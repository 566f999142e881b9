"""All arms of a sweep are checked before the first starts."""

from sdtrain.config.trusted import renewed
from sdtrain.errors import StorageError, UserError
from sdtrain.redaction import redacted
from sdtrain.runs.config import read_config
from sdtrain.runs.layout import RunFolder
from sdtrain.runs.resume import (
    FIXED_ON_RESUME,
    FREE_ON_RESUME,
    compare_configs,
    is_below,
    is_hash,
    listed,
)
from sdtrain.sweep.arms import Arm
from sdtrain.sweep.draft import SweepDraft, refused_in_arm
from sdtrain.training.plan import make_plan

FIXED_IN_A_SWEEP = (*FIXED_ON_RESUME, "optimizer", "lr_schedule", "trainer", "callbacks.ema")
"""A run that lies in an arm's folder must agree in these. In the budget too: arms are compared at
the same one."""

FREE_IN_A_SWEEP = (
    *FREE_ON_RESUME,
    "trainer.log_every",
    "trainer.threads",
    "trainer.accelerator",
    "trainer.devices",
)


def check_arms(sweep: SweepDraft) -> list[Arm]:
    """The arms, ready to start.

    Raises UserError where one of them would be refused, or would train what another trains.
    """
    arms = []
    for name, draft in sweep.arms.items():
        with refused_in_arm(name):
            config = make_plan(draft).config
        words = [*draft.overrides, *sweep.search_path]
        arms.append(Arm(name, sweep.folder.arm(name), words, config))
    for arm in arms:
        _refuse_another_run(arm)
    _refuse_duplicates(arms)
    return arms


def _refuse_another_run(arm: Arm) -> None:
    changes = changes_since_begun(arm.run, arm.config)
    if changes:
        raise UserError(
            f"{arm.run.path} holds a run with another configuration ({listed(changes)})",
            key=next(iter(changes)),
            remedy="Set it back, or choose another hydra.sweep.dir.",
        )


def changes_since_begun(run: RunFolder, config: dict) -> dict[str, tuple]:
    """{key: (old, new)} of what makes `config` another run than the one that lies in the folder.

    Empty where no run lies there.
    """
    try:
        saved = read_config(run.config)
    except StorageError:
        return {}
    free = [*FREE_IN_A_SWEEP, *config["resume_allow"]]
    if config.get("first_stage"):
        free.append("model.autoencoder.path")  # the sweep itself sets it
    found = {}
    for key, pair in compare_configs(renewed(saved), redacted(config)).changed.items():
        is_free = is_hash(key) or is_below(key, free)
        if is_below(key, FIXED_IN_A_SWEEP) and not is_free:
            found[key] = pair
    return found


def _refuse_duplicates(arms: list[Arm]) -> None:
    for place, arm in enumerate(arms):
        for other in arms[:place]:
            if other.config == arm.config:
                raise UserError(
                    f"The arms {other.name} and {arm.name} have the same configuration, "
                    "and would give the same weights",
                    remedy="Leave one out.",
                )
