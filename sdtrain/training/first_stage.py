"""The autoencoder that an experiment brings along is trained first: by its own command, in its own
process, below the run's folder.
"""

import contextlib
import json
import signal
import subprocess
from pathlib import Path

from sdtrain.assemble.model import try_networks
from sdtrain.config.compose import PRIMARY, compose_config, current_composition, where_to_look
from sdtrain.config.draft import check_draft
from sdtrain.config.flags import read_flags
from sdtrain.config.launch import is_started_by_launcher
from sdtrain.config.overrides import quoted
from sdtrain.errors import UserError
from sdtrain.runs.layout import RunFolder
from sdtrain.runs.manifest import published
from sdtrain.runs.start import nothing_to_resume
from sdtrain.signals import INTERRUPTED, Interrupted, Signals, exit_code_of
from sdtrain.training.child import (
    child_environment,
    stop_with_parent,
    train_command,
    typed_run_dir,
)
from sdtrain.training.datamodule import check_batch
from sdtrain.training.estimate import estimate
from sdtrain.training.outcome import Run
from sdtrain.training.parts import saved_config, write_config
from sdtrain.training.plan import Plan, make_plan
from sdtrain.types import PictureData

RECIPE_BATCH = 16
"""Pictures of one optimizer step of the recipe, unless there are few."""

SHARED_KEYS = ("accelerator", "threads")
"""Keys under `trainer` that hold for both stages; so do the logger and the data."""


def first_stage_done(run: RunFolder) -> bool:
    return run.first_stage.autoencoder_config.is_file()


def first_stage_words(config: dict, overrides: list[str]) -> list[str]:
    """What sdtrain is told to train the autoencoder on the run's data."""
    stage = config["first_stage"]
    data = config["data"]
    own_words = {"_target_", "batch_size"}
    if data.get("on_error") == "fail":
        own_words.add("max_skipped")  # it would have no effect
    words = where_to_look(overrides)
    words += [f"experiment={stage['experiment']}", "logger=none"]
    words += _setting("data", {key: data[key] for key in data.keys() - own_words})
    words.append(f"data.batch_size={min(RECIPE_BATCH, data['batch_size'])}")
    words += _setting("trainer", {key: config["trainer"].get(key) for key in SHARED_KEYS})
    words += _setting("logger", config.get("logger") or {})
    words.append(f"seed={config['seed']}")
    words.append(f"trainer.max_images={stage['max_images']}")
    return words


def _setting(section: str, values: dict) -> list[str]:
    """Overrides that set the keys of a section, whether or not they are there."""
    words = []
    for key, value in sorted(values.items()):
        typed = quoted(value) if isinstance(value, str) else json.dumps(value)
        words.append(f"++{section}.{key}={typed}")
    return words


def train_first_stage(config: dict, overrides: list[str], folder: Path, signals: Signals) -> int:
    """Its exit code, 0 for a trained autoencoder; it has printed its own paragraph otherwise.

    Raises Interrupted after a signal, once it has saved or before there was anything to save, and
    UserError where it was killed.
    """
    run = RunFolder(folder)
    command = train_command(first_stage_words(config, overrides), run.first_stage)
    # In a session of its own: a signal reaches it from here, once, and not from the terminal as
    # well.
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
            "perhaps because memory was short",
            key="first_stage.max_images",
            remedy=f"It goes on where it was with resume=auto {typed_run_dir(RunFolder(folder))}; "
            "first_stage.max_images is its length.",
        )
    return code


def _wait(process: subprocess.Popen, signals: Signals) -> None:
    """Until it has ended; a signal that this process receives is handed on once."""
    forwarded = False
    while process.poll() is None:
        if signals.received and not forwarded:
            # SIGUSR1 is no second signal, where it has had one like this process.
            process.send_signal(signal.SIGUSR1)
            forwarded = True
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)


def check_before_first_stage(plan: Plan, data: PictureData) -> None:
    """Raises UserError or DataError for what would otherwise be found once the autoencoder is
    trained: pictures, batch, condition and network that do not fit.
    """
    config = plan.config
    if not config.get("first_stage"):
        return
    check_batch(config["data"]["batch_size"], data.split("train"))
    try_networks(config, data)


def estimate_line(plan: Plan, overrides: list[str], data: PictureData) -> str:
    """How long the first stage will take, and the run after it."""
    flags, words = read_flags(first_stage_words(plan.config, overrides))
    stage = make_plan(check_draft(compose_config(PRIMARY, words, flags), words))
    images = [each.draft.trainer.max_images for each in (stage, plan)]
    return estimate(stage, plan, data).line(*images)


def train_first(plan: Plan, data: PictureData, run: Run) -> None:
    """Trains the autoencoder, unless it lies there already. From then on the folder is known for
    this run's.
    """
    config = plan.config
    if not config.get("first_stage") or first_stage_done(run.folder):
        return
    if config["resume"] == "must" and not published(run.folder.first_stage.path):
        raise nothing_to_resume(run.folder, "must")
    if is_started_by_launcher():  # each of the ranks would
        experiment = config["first_stage"]["experiment"]
        raise UserError(
            "first_stage cannot be trained under torchrun or srun",
            key="model.autoencoder.path",
            remedy=f"Train it by itself with `sdtrain experiment={experiment}`, then set "
            "model.autoencoder.path=RUN/autoencoder.",
        )
    run.console.print(f"First stage: sdtrain experiment={config['first_stage']['experiment']}")
    composition = current_composition()
    run.console.print(estimate_line(plan, composition, data), soft_wrap=True)
    write_config(run.folder, saved_config(plan))
    run.write_status("running")
    code = train_first_stage(config, composition, run.folder.path, run.signals)
    if code:
        if published(run.folder.first_stage.path):
            run.write_status("failed", code)
        else:
            run.forget()
        raise SystemExit(code)
