"""Check every arm of a sweep completely before the first one starts."""

from sdtrain.assemble.load import pick_device
from sdtrain.config.precheck import is_autoencoder
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
    if not sweep.launcher.prefix:  # with one, arms run on machines that this one does not know
        _settle_precision(arms)
    _refuse_duplicates(arms)
    return arms


def _settle_precision(arms: list[Arm]) -> None:
    """Resolve trainer.precision=auto once for all arms on one kind of device, so that they can be
    compared.

    An arm that has begun keeps its precision, and the others take that of the first such arm.
    """
    by_kind: dict[tuple, list[Arm]] = {}
    for arm in arms:
        if arm.config["trainer"]["precision"] == AUTO:
            kind = (arm.config["trainer"]["accelerator"], is_autoencoder(arm.config))
            by_kind.setdefault(kind, []).append(arm)
    for (accelerator, trains_autoencoder), arms_of_kind in by_kind.items():
        saved = [saved_precision(arm.run) for arm in arms_of_kind]
        common = next((precision for precision in saved if precision is not None), None)
        if common is None:
            device = pick_device(accelerator)
            choice = choose_precision(device, trains_autoencoder=trains_autoencoder)
            print(choice.line, flush=True)
            common = choice.precision
        for arm, own in zip(arms_of_kind, saved, strict=True):
            precision = own or common
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
