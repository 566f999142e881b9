"""Trains the autoencoder of an experiment before the diffusion model: with its own command, in a
child process, in a folder below the run's.
"""

import contextlib
import json
import signal
import subprocess
from pathlib import Path

from sdtrain.assemble.model import try_networks
from sdtrain.config.bucket_step import BUCKET_KEYS
from sdtrain.config.compose import (
    PRIMARY,
    compose_config,
    current_composition_arguments,
    first_stage_composition,
)
from sdtrain.config.flags import read_flags
from sdtrain.config.launch import is_started_by_launcher
from sdtrain.config.overrides import quoted, typed_keys
from sdtrain.config.precheck import precheck_config
from sdtrain.config.prior import PRIOR_KEYS
from sdtrain.errors import UserError
from sdtrain.runs.layout import RunFolder
from sdtrain.runs.manifest import list_checkpoints
from sdtrain.runs.resume import flatten_leaves
from sdtrain.runs.start import nothing_to_resume_error
from sdtrain.signals import INTERRUPTED, Interrupted, Signals, exit_code_of
from sdtrain.training.child import (
    child_environment,
    run_dir_for_shell,
    stop_with_parent,
    train_command,
)
from sdtrain.training.datamodule import check_batch
from sdtrain.training.estimate import estimate
from sdtrain.training.loggers.media import with_environment
from sdtrain.training.outcome import Run
from sdtrain.training.parts import saved_config, write_config
from sdtrain.training.plan import Plan, make_plan
from sdtrain.types import PictureData, extras_of

RECIPE_BATCH = 16
"""Batch size of the first stage, unless the run's is smaller."""

DEPTH_KEYS = ("depth", "depth_model")
"""Keys under `data` that only the second stage reads."""

SHARED_KEYS = ("accelerator", "threads")
"""Keys under `trainer` that both stages share, like the logger and the data."""


def first_stage_done(run: RunFolder) -> bool:
    """Return whether the first stage of the run is trained."""
    return run.first_stage.autoencoder_config.is_file()


def first_stage_words(config: dict, overrides: list[str]) -> list[str]:
    """Return the arguments of the sdtrain command that trains the autoencoder on the run's data.

    overrides: the arguments of this run: what was typed, and the folders of the user's
        configuration files.
    """
    stage = config["first_stage"]
    data = config["data"]
    # The run has refreshed the listing, and an autoencoder reads squares of the pictures.
    excluded_keys = {
        "_target_",
        "batch_size",
        "refresh",
        "cache",
        *DEPTH_KEYS,
        *PRIOR_KEYS,
        *BUCKET_KEYS,
    }
    if data.get("on_error") == "fail":
        excluded_keys.add("max_skipped")  # it would have no effect
    words = first_stage_composition(overrides)
    words += [f"experiment={stage['experiment']}", "logger=none"]
    words += _section_overrides("data", {key: data[key] for key in data.keys() - excluded_keys})
    words.append(f"data.batch_size={min(RECIPE_BATCH, data['batch_size'])}")
    shared = {key: config["trainer"].get(key) for key in SHARED_KEYS}
    words += _section_overrides("trainer", shared)
    # The child takes them for typed, which would come before wandb's environment variables.
    logger = with_environment(config.get("logger"), typed_keys(overrides))
    words += _section_overrides("logger", logger or {})
    words.append(f"seed={config['seed']}")
    words.append(f"trainer.max_images={stage['max_images']}")
    return words


def _section_overrides(section: str, values: dict) -> list[str]:
    """Return overrides that set the keys of a section, or add those that it lacks."""
    overrides = []
    for key, value in sorted(flatten_leaves(values).items()):
        text = quoted(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        overrides.append(f"++{section}.{key}={text}")
    return overrides


def train_first_stage(config: dict, overrides: list[str], folder: Path, signals: Signals) -> int:
    """Train the autoencoder in a child process and return its exit code, 0 for success.

    On failure the child has printed its own paragraph. Raises Interrupted after a signal, once the
    child has saved or if it had nothing to save yet, and UserError if the child was killed.
    """
    run = RunFolder(folder)
    command = train_command(first_stage_words(config, overrides), run.first_stage)
    # In its own session, so that it gets a signal once, from this process, and not from the
    # terminal too.
    process = subprocess.Popen(
        command,
        env=child_environment(run.first_stage.name),
        start_new_session=True,
        preexec_fn=stop_with_parent,
    )
    _wait(process, signals)
    code = process.returncode
    if signals.received and code:
        raise Interrupted(exit_code_of(signals.received))
    if code in INTERRUPTED:
        raise Interrupted(code)
    if code < 0:
        raise UserError(
            f"The first stage was killed by {signal.Signals(-code).name}, "
            "perhaps because memory ran out",
            key="first_stage.max_images",
            remedy=f"Resume it with resume=auto {run_dir_for_shell(run)}; "
            "first_stage.max_images is its length.",
        )
    return code


def _wait(process: subprocess.Popen, signals: Signals) -> None:
    """Wait until the process has ended, and forward a signal that this process receives, once."""
    forwarded = False
    while process.poll() is None:
        if signals.received and not forwarded:
            # If the child has received the same signal already, SIGUSR1 does not count as a second
            # one, which would end it at once.
            process.send_signal(signal.SIGUSR1)
            forwarded = True
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)


def check_before_first_stage(plan: Plan, data: PictureData) -> None:
    """Raise UserError or DataError before the first stage if pictures, batch, condition and network
    do not fit, which would otherwise fail only once the autoencoder is trained.
    """
    config = plan.config
    if not config.get("first_stage"):
        return
    has_prior = extras_of(data).prior is not None
    check_batch(config["data"]["batch_size"], data.split("train"), has_prior=has_prior)
    try_networks(config, data)


def arguments_of_run(plan: Plan) -> list[str]:
    """Return the arguments of this run, see first_stage_words."""
    return [*current_composition_arguments(), *plan.prechecked.overrides]


def first_stage_plan(plan: Plan, overrides: list[str]) -> Plan:
    """Return the plan of the first stage of a run. overrides: see first_stage_words."""
    flags, words = read_flags(first_stage_words(plan.config, overrides))
    return make_plan(precheck_config(compose_config(PRIMARY, words, flags), words))


def estimate_line(plan: Plan, overrides: list[str], data: PictureData) -> str:
    """Return a line with the estimated time of the first stage and of the run after it."""
    stage = first_stage_plan(plan, overrides)
    first_images = stage.prechecked.trainer.max_images
    run_images = plan.prechecked.trainer.max_images
    return estimate(stage, plan, data).line(first_images, run_images)


def refuse_launched_first_stage(config: dict) -> None:
    """Raise UserError under torchrun or srun, where every rank would train the first stage."""
    if is_started_by_launcher():
        experiment = config["first_stage"]["experiment"]
        raise UserError(
            "The first stage cannot be trained under torchrun or srun",
            key="model.autoencoder.path",
            remedy=f"Train it separately with `sdtrain experiment={experiment}`, then set "
            "model.autoencoder.path=RUN/autoencoder.",
        )


def run_first_stage(plan: Plan, data: PictureData, run: Run) -> None:
    """Train the autoencoder, unless the run has none or it is trained already.

    The run's configuration and status are written first, so that the folder can be recognised.
    Raises SystemExit with the exit code of a first stage that failed.
    """
    config = plan.config
    if not config.get("first_stage") or first_stage_done(run.folder):
        return
    if config["resume"] == "must" and not list_checkpoints(run.folder.first_stage.path):
        raise nothing_to_resume_error(run.folder, "must")
    refuse_launched_first_stage(config)
    run.console.print(f"First stage: sdtrain experiment={config['first_stage']['experiment']}")
    arguments = arguments_of_run(plan)
    run.console.print(estimate_line(plan, arguments, data), soft_wrap=True)
    write_config(run.folder, saved_config(plan))
    run.write_status("running")
    code = train_first_stage(config, arguments, run.folder.path, run.signals)
    if code:
        if list_checkpoints(run.folder.first_stage.path):
            run.write_status("failed", code)
        else:
            run.discard()
        raise SystemExit(code)
