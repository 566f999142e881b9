"""All arms of a sweep are checked before the first starts."""

from sdtrain.config.trusted import renewed
from sdtrain.errors import StorageError, UserError
from sdtrain.redaction import redacted
from sdtrain.runs.config import read_config
from sdtrain.runs.layout import RunFolder
from sdtrain.runs.resume import compare_arms, listed
from sdtrain.sweep.arms import Arm
from sdtrain.sweep.draft import SweepDraft, refused_in_arm
from sdtrain.training.plan import make_plan


def check_arms(sweep: SweepDraft) -> list[Arm]:
    """The arms, ready to start.

    Raises UserError where one of them would be refused, or would train what another trains.
    """
    arms = []
    for name, draft in sweep.arms.items():
        with refused_in_arm(name):
            config = make_plan(draft).config
        words = [*draft.overrides, *sweep.composition]
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
    allowed = list(config["resume_allow"])
    if config.get("first_stage"):
        allowed.append("model.autoencoder.path")  # the sweep itself sets it
    return compare_arms(renewed(saved), redacted(config), allowed).refused


def _refuse_duplicates(arms: list[Arm]) -> None:
    for place, arm in enumerate(arms):
        for other in arms[:place]:
            if other.config == arm.config:
                raise UserError(
                    f"The arms {other.name} and {arm.name} have the same configuration, "
                    "and would give the same weights",
                    key="hydra.sweeper.params",
                    remedy="Leave one out.",
                )
