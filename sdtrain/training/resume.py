"""Going on with a run: from which checkpoint, and whether that would mix two runs."""

from pathlib import Path

import torch
from omegaconf import OmegaConf

from sdtrain.assemble.kept_files import SHA256
from sdtrain.assemble.load import as_it_was
from sdtrain.config.draft import Draft
from sdtrain.config.trusted import renewed
from sdtrain.console import global_rank
from sdtrain.errors import StorageError, UserError
from sdtrain.redaction import redacted
from sdtrain.runs.checkpoint import read_weights
from sdtrain.runs.config import read_config
from sdtrain.runs.layout import CheckpointFolder, RunFolder
from sdtrain.runs.manifest import newest_whole, published, set_aside
from sdtrain.runs.resume import compare_configs, is_below, listed, may_go_on
from sdtrain.runs.start import nothing_to_resume
from sdtrain.runs.status import read_status
from sdtrain.training.outcome import Run
from sdtrain.training.parts import Parts
from sdtrain.training.plan import Plan, make_plan


def checkpoint_to_resume(run: Run, plan: Plan, parts: Parts, config: str) -> Path | None:
    """The checkpoint to go on from, None to start anew. Raises UserError where that would mix two
    runs.

    config: this run's yaml. Newer checkpoints that are not whole are set aside.
    """
    resume = plan.draft.resume
    if resume == "never":
        return None
    found = published(run.folder.path)
    newest, passed_over = newest_whole(run.folder.path)
    for line in passed_over:
        run.console.print(line, soft_wrap=True)
    if newest is not None:
        _print_resume(run, plan, parts, newest, config)
    elif resume == "must" or found:  # to start anew would write over what there is
        raise nothing_to_resume(run.folder, resume)
    else:
        run.console.print("resume=auto: there is nothing to resume, the run starts anew.")
    run.take_over()
    if global_rank() == 0:
        last = -1 if newest is None else CheckpointFolder(newest).images_seen
        set_aside([each for each in found if CheckpointFolder(each).images_seen > last])
    return newest


def _print_resume(run: Run, plan: Plan, parts: Parts, checkpoint: Path, config: str) -> None:
    """Says what has changed since the checkpoint, or refuses it."""
    new = OmegaConf.to_container(OmegaConf.create(config))
    allowed = plan.draft.resume_allow
    for line in applied_changes(checkpoint, new, parts.module, allowed):
        run.console.print(line, soft_wrap=True)
    run.console.print(f"Going on from {checkpoint}", soft_wrap=True)
    seen = CheckpointFolder(checkpoint).images_seen
    budget = run.progress.max_images
    if seen >= budget:
        run.console.print(
            f"There is nothing left to train: trainer.max_images={budget}, and {seen} were seen."
        )


def applied_changes(
    checkpoint: Path, config: dict, module: torch.nn.Module, allowed: list[str]
) -> list[str]:
    """A line for each key that differs from the checkpoint's. UserError where one of them would
    make it another run, and is not allowed.
    """
    saved = renewed(read_config(CheckpointFolder(checkpoint).config))
    if "latent_shift" in config["model"].get("autoencoder", {}):
        as_it_was(saved["model"]["autoencoder"])
    changes = compare_configs(saved, config, allowed)
    if changes.refused:
        raise _another_run(checkpoint, config, changes.refused, allowed)
    if any(is_below(key, ["model"]) for key in changes.changed):
        check_weights(checkpoint, module)
    lines = []
    for key, (old, new) in changes.changed.items():
        lines.append(f"changed since the checkpoint: {key}: {old} -> {new}")
    return lines


def _another_run(checkpoint: Path, config: dict, refused: dict, allowed: list[str]) -> UserError:
    differences = listed(refused)
    if "data.sha256" in refused:
        of_a_folder = "path" in config["data"]
        what = "the pictures or captions in data.path" if of_a_folder else "the emoji of data.font"
        differences += f"; data.sha256: {what} changed since the run began"
    for key in refused:
        if key.endswith(f".{SHA256}"):
            differences += f"; {key}: the files that it reads changed since the run began"
    groups = [*allowed, *(key.partition(".")[0] for key in refused)]
    to_allow = ",".join(dict.fromkeys(groups))
    run = CheckpointFolder(checkpoint).run.path
    return UserError(
        f"The run in {run} cannot go on with another configuration ({differences})",
        key=next(iter(refused)),
        remedy="Set them back, choose another hydra.run.dir, or allow it with "
        f"resume_allow=[{to_allow}].",
    )


def check_weights(checkpoint: Path, module: torch.nn.Module) -> None:
    """Raises UserError where a model that was allowed to change does not fit the weights."""
    old = {name: list(v.shape) for name, v in read_weights(checkpoint, "model").items()}
    new = {name: list(v.shape) for name, v in module.state_dict().items()}
    for name in sorted(old.keys() | new.keys()):
        there = old.get(name, "missing")
        here = new.get(name, "missing")
        if there != here:
            raise UserError(
                f"The weights of {checkpoint} do not fit the changed model: "
                f"{name} is {there} there and {here} here",
                key="model",
                remedy="Set model back, or choose another hydra.run.dir.",
            )


def newest_unfinished(draft: Draft) -> Path | None:
    """The newest run under runs/ of the same name, with a checkpoint, that has not finished and
    that this configuration may go on with. None too where a plan cannot be made of it: the run
    itself reports that.
    """
    try:
        plan = make_plan(draft)
    except UserError:
        return None
    wanted = redacted(plan.config)
    statuses = Path("runs", wanted["name"]).glob(f"*/{RunFolder(Path()).status.name}")
    for status in sorted(statuses, key=lambda path: path.stat().st_mtime, reverse=True):
        run = RunFolder(status.parent)
        if _has_checkpoint(run) and _is_resumable(run, wanted, draft.resume_allow):
            return run.path.resolve()
    return None


def _has_checkpoint(run: RunFolder) -> bool:
    return bool(published(run.path) or published(run.first_stage.path))


def _is_resumable(run: RunFolder, wanted: dict, allowed: list[str]) -> bool:
    if read_status(run).get("state", "finished") == "finished":
        return False
    try:
        saved = renewed(read_config(run.config))
    except StorageError:
        return False  # no file of ours
    return may_go_on(saved, wanted, allowed)
