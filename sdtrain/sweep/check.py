"""Check every arm of a sweep completely before the first one starts."""

from sdtrain.assemble.load import pick_device
from sdtrain.config.trusted import upgrade_config
from sdtrain.errors import StorageError, UserError
from sdtrain.redaction import redacted
from sdtrain.runs.config import read_config
from sdtrain.runs.layout import RunFolder
from sdtrain.runs.resume import compare_arm_configs, format_changes
from sdtrain.sweep.arms import Arm
from sdtrain.sweep.precheck import PrecheckedSweep, name_arm_in_errors
from sdtrain.training.plan import make_plan
from sdtrain.training.precision import AUTO, choose_precision, saved_precision


def make_arms(sweep: PrecheckedSweep) -> list[Arm]:
    """Return the arms, checked and ready to start.

    Raises UserError if an arm has an invalid configuration, if its folder holds a different run, or
    if two arms have the same configuration.
    """
    arms = []
    for name, prechecked in sweep.arms.items():
        with name_arm_in_errors(name):
            config = make_plan(prechecked).config
        arguments = [*prechecked.overrides, *sweep.composition]
        arms.append(Arm(name, sweep.folder.arm(name), arguments, config))
    for arm in arms:
        _refuse_different_run(arm)
    _settle_precision(arms)
    _refuse_duplicates(arms)
    return arms


def _settle_precision(arms: list[Arm]) -> None:
    """Resolve trainer.precision=auto, once for all arms, so that they can be compared.

    An arm that has begun keeps its precision, and the others take it from the first such arm.
    """
    undecided = [arm for arm in arms if arm.config["trainer"]["precision"] == AUTO]
    begun = {}
    for arm in undecided:
        precision = saved_precision(arm.run)
        if precision is not None:
            begun[arm.name] = precision
    choices = {}
    for arm in undecided:
        device = pick_device(arm.config["trainer"]["accelerator"])
        if arm.name in begun:
            precision = begun[arm.name]
        elif begun:
            precision = next(iter(begun.values()))
        else:
            if device not in choices:
                choices[device] = choose_precision(device)
                print(choices[device].line, flush=True)
            precision = choices[device].precision
        arm.config["trainer"]["precision"] = precision
        arm.arguments.append(f"trainer.precision={precision}")


def _refuse_different_run(arm: Arm) -> None:
    changes = refused_changes(arm.run, arm.config)
    if changes:
        raise UserError(
            f"{arm.run.path} holds a run with another configuration ({format_changes(changes)})",
            key=next(iter(changes)),
            remedy="Set it back, or choose another hydra.sweep.dir.",
        )


def refused_changes(run: RunFolder, config: dict) -> dict[str, tuple]:
    """Return {key: (old, new)}: what differs between the run in a folder and `config`, apart from
    what may change when a run is resumed.

    Empty if the folder holds no run.
    """
    try:
        saved = read_config(run.config)
    except StorageError:
        return {}
    allowed = list(config["resume_allow"])
    if config["trainer"]["precision"] == AUTO:
        allowed.append("trainer.precision")
    if config.get("first_stage"):
        allowed.append("model.autoencoder.path")  # the sweep itself sets it
    return compare_arm_configs(upgrade_config(saved), redacted(config), allowed).refused


def _refuse_duplicates(arms: list[Arm]) -> None:
    for index, arm in enumerate(arms):
        for earlier in arms[:index]:
            if earlier.config == arm.config:
                raise UserError(
                    f"The arms {earlier.name} and {arm.name} have the same configuration and "
                    "would end with the same weights",
                    key="hydra.sweeper.params",
                    remedy="Leave one out.",
                )
