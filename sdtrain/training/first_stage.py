"""The autoencoder that an experiment brings along is trained first: by its own command, in its own process, below the run's folder."""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from sdtrain.config.overrides import quoted
from sdtrain.errors import UserError
from sdtrain.training.callbacks.checkpoint import Interrupted, Signals

FOLDER = "first_stage"


def first_stage_done(run_dir: Path) -> bool:
    return (run_dir / FOLDER / "autoencoder" / "config.json").is_file()


def command_of(cfg: dict, overrides: list[str], run_dir: Path) -> list[str]:
    """sdtrain on the run's data; what was typed of devices, threads and logger holds for both stages."""
    stage, data = cfg["first_stage"], cfg["data"]
    without_effect = {"max_skipped"} if data.get("on_error") == "fail" else set()
    same_data = {
        key: value
        for key, value in data.items()
        if key not in {"_target_", "batch_size"} | without_effect
    }
    words = [
        f"++data.{key}={quoted(value) if isinstance(value, str) else json.dumps(value)}"
        for key, value in same_data.items()
    ]
    words.append(
        f"data.batch_size={min(16, data['batch_size'])}"
    )  # the recipe's, unless there are few pictures
    words += [
        word
        for word in overrides
        if word.startswith(("trainer.accelerator=", "trainer.threads=", "logger=", "logger."))
    ]
    return [
        sys.executable,
        "-m",
        "sdtrain.commands.train",
        f"experiment={stage['experiment']}",
        *words,
        f"seed={cfg['seed']}",
        f"trainer.max_images={stage['max_images']}",
        "resume=auto",
        f"hydra.run.dir={run_dir / FOLDER}",
    ]


def stop_with_parent() -> None:
    """Run in the child: SIGTERM, on which it saves, where its parent dies without a word. Linux alone has it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def train_first_stage(cfg: dict, overrides: list[str], run_dir: Path, signals: Signals) -> int:
    """Its exit code, 0 for a trained autoencoder; it has said why in a paragraph. Raises Interrupted after a signal, once it has saved or
    before there was anything to save, and UserError where it was killed."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise UserError(
            f"first_stage cannot be trained under torchrun. Train it by itself with `sdtrain experiment={cfg['first_stage']['experiment']}`, then set "
            f"model.autoencoder.path=RUN/autoencoder."
        )
    # In a session of its own: a signal reaches it from here, once, and not from the terminal as well.
    process, forwarded = (
        subprocess.Popen(
            command_of(cfg, overrides, run_dir), start_new_session=True, preexec_fn=stop_with_parent
        ),
        False,
    )
    while process.poll() is None:
        if signals.received and not forwarded:
            process.send_signal(
                signal.SIGUSR1
            )  # which is no second signal, where it has had one like this process
            forwarded = True
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
    if signals.received and process.returncode:
        raise Interrupted(130 if signals.received == signal.SIGINT else 143)
    if process.returncode in (130, 143):
        raise Interrupted(process.returncode)
    if process.returncode < 0:
        raise UserError(
            f"The first stage was killed by {signal.Signals(-process.returncode).name}, perhaps because memory was short. It goes on where it was with "
            f"resume=auto hydra.run.dir={str(run_dir)!r}; first_stage.max_images is its length."
        )
    return process.returncode
