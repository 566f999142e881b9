"""Resumes a run: chooses the checkpoint, and refuses one that would mix two different runs."""

from pathlib import Path

import torch
from omegaconf import OmegaConf

from sdtrain.assemble.kept_files import SHA256
from sdtrain.assemble.load import restore_old_defaults
from sdtrain.config.precheck import PrecheckedConfig
from sdtrain.config.trusted import upgrade_config
from sdtrain.console import global_rank
from sdtrain.errors import StorageError, UserError
from sdtrain.redaction import redacted
from sdtrain.runs.checkpoint import read_weights
from sdtrain.runs.config import read_config
from sdtrain.runs.layout import CheckpointFolder, RunFolder
from sdtrain.runs.manifest import list_checkpoints, mark_damaged, newest_intact
from sdtrain.runs.resume import compare_configs, format_changes, is_below, may_resume
from sdtrain.runs.start import nothing_to_resume_error
from sdtrain.runs.status import read_status
from sdtrain.training.optimisation import OptimisedModule
from sdtrain.training.outcome import Run
from sdtrain.training.parts import Parts
from sdtrain.training.plan import Plan, make_plan


def checkpoint_to_resume(run: Run, plan: Plan, parts: Parts, config: str) -> Path | None:
    """Return the checkpoint to resume from, or None to start a new run.

    Raises UserError if resuming would mix two different runs. Newer checkpoints that are damaged
    are set aside.

    config: this run's yaml.
    """
    resume = plan.prechecked.resume
    if resume == "never":
        return None
    checkpoints = list_checkpoints(run.folder.path)
    newest, damage_lines = newest_intact(run.folder.path)
    for line in damage_lines:
        run.console.print(line, soft_wrap=True)
    if newest is not None:
        _announce_resume(run, plan, parts, newest, config)
    elif resume == "must" or checkpoints:  # a new run would overwrite the damaged checkpoints
        raise nothing_to_resume_error(run.folder, resume)
    else:
        run.console.print("resume=auto: there is nothing to resume, a new run starts.")
    run.take_over()
    if global_rank() == 0:
        last = -1 if newest is None else CheckpointFolder(newest).images_seen
        mark_damaged([each for each in checkpoints if CheckpointFolder(each).images_seen > last])
    return newest


def _announce_resume(run: Run, plan: Plan, parts: Parts, checkpoint: Path, config: str) -> None:
    """Print the checkpoint and what has changed since it. Raises UserError if it does not fit."""
    new = OmegaConf.to_container(OmegaConf.create(config))
    allowed = plan.prechecked.resume_allow
    for line in check_changes(checkpoint, new, parts.module, allowed):
        run.console.print(line, soft_wrap=True)
    run.console.print(f"Resuming from {checkpoint}", soft_wrap=True)
    seen = CheckpointFolder(checkpoint).images_seen
    budget = run.progress.max_images
    if seen >= budget:
        run.console.print(
            f"There is nothing left to train: trainer.max_images={budget}, and {seen} were seen."
        )


def check_changes(
    checkpoint: Path, config: dict, module: OptimisedModule, allowed: list[str]
) -> list[str]:
    """Return a line for each key that differs from the checkpoint's configuration.

    The module is told if its optimizer is another one, whose state is of no use to it.

    Raises UserError if a key that must not differ does and is not in `allowed`, or if the
    checkpoint's weights do not fit the changed model.
    """
    saved = upgrade_config(read_config(CheckpointFolder(checkpoint).config))
    if "latent_shift" in config["model"].get("autoencoder", {}):
        restore_old_defaults(saved["model"]["autoencoder"])
    changes = compare_configs(saved, config, allowed)
    if changes.refused:
        raise _configuration_differs(checkpoint, config, changes.refused, allowed)
    if any(is_below(key, ["model"]) for key in changes.changed):
        check_weights(checkpoint, module)
    lines = []
    for key, (old, new) in changes.changed.items():
        lines.append(f"changed since the checkpoint: {format_changes({key: (old, new)})}")
    if "optimizer._target_" in changes.changed:
        module.starts_optimizer_anew = True
        lines.append("The optimizer starts anew: the checkpoint holds the state of another one.")
    return lines


def _configuration_differs(
    checkpoint: Path, config: dict, refused: dict, allowed: list[str]
) -> UserError:
    differences = format_changes(refused)
    if "data.sha256" in refused:
        has_folder = "path" in config["data"]
        what = "the pictures or captions in data.path" if has_folder else "the emoji of data.font"
        differences += f"; data.sha256: {what} changed since the run began"
    to_allow = list(allowed)
    for key in refused:
        if key.endswith(f".{SHA256}"):
            differences += f"; {key}: the files that it reads changed since the run began"
        to_allow.append(key.partition(".")[0])
    run = CheckpointFolder(checkpoint).run.path
    return UserError(
        f"The run in {run} cannot be resumed with a different configuration ({differences})",
        key=next(iter(refused)),
        remedy="Set these keys back, choose another hydra.run.dir, or allow the changes with "
        f"resume_allow=[{','.join(dict.fromkeys(to_allow))}].",
    )


def check_weights(checkpoint: Path, module: torch.nn.Module) -> None:
    """Raise UserError if the checkpoint's weights do not have the module's names and shapes."""
    old = _shapes(read_weights(checkpoint, "model"))
    new = _shapes(module.state_dict())
    for name in sorted(old.keys() | new.keys()):
        saved_shape = old.get(name, "missing")
        new_shape = new.get(name, "missing")
        if saved_shape != new_shape:
            raise UserError(
                f"The weights of {checkpoint} do not fit the changed model: {name} has the shape "
                f"{saved_shape} in the checkpoint and {new_shape} in the model",
                key="model",
                remedy="Set model back, or choose another hydra.run.dir.",
            )


def _shapes(weights: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in weights.items()}


def newest_unfinished(prechecked: PrecheckedConfig) -> Path | None:
    """Return the folder of the newest run under runs/NAME that has a checkpoint, has not finished
    and may be resumed with this configuration.

    Returns None if there is no such run, or if the configuration is not valid: the run itself
    reports that.
    """
    try:
        plan = make_plan(prechecked)
    except UserError:
        return None
    config = redacted(plan.config)
    statuses = Path("runs", config["name"]).glob(f"*/{RunFolder(Path()).status.name}")
    for status in sorted(statuses, key=lambda path: path.stat().st_mtime, reverse=True):
        run = RunFolder(status.parent)
        if _has_checkpoint(run) and _is_resumable(run, config, prechecked.resume_allow):
            return run.path.resolve()
    return None


def _has_checkpoint(run: RunFolder) -> bool:
    return bool(list_checkpoints(run.path) or list_checkpoints(run.first_stage.path))


def _is_resumable(run: RunFolder, config: dict, allowed: list[str]) -> bool:
    """Return whether the run is unfinished and compatible with `config`."""
    if read_status(run).get("state", "finished") == "finished":
        return False
    try:
        saved = upgrade_config(read_config(run.config))
    except StorageError:
        return False  # not a configuration that sdtrain has written
    return may_resume(saved, config, allowed)
