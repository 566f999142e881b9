"""Run the arms of a sweep, in parallel where there are several devices.

Arms that finished earlier are skipped; arms that were stopped are resumed.
"""

import contextlib
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from sdtrain.config.overrides import quoted
from sdtrain.errors import StorageError
from sdtrain.report.compare import compare
from sdtrain.report.ranking import ranking_lines
from sdtrain.report.record import read_validations
from sdtrain.runs.layout import RunFolder, SweepFolder
from sdtrain.runs.lock import hold_folder
from sdtrain.runs.reader import find_runs
from sdtrain.runs.status import is_finished
from sdtrain.signals import INTERRUPTING, Signals, exit_code_of
from sdtrain.sweep.arms import Arm
from sdtrain.sweep.check import make_arms
from sdtrain.sweep.launcher_settings import LauncherSettings
from sdtrain.sweep.precheck import PrecheckedSweep
from sdtrain.sweep.record import record_sweep
from sdtrain.sweep.shared_training import copy_newest_checkpoint, find_shared_training
from sdtrain.training.first_stage import first_stage_done, train_first_stage

POLL_INTERVAL = 0.05  # seconds


def run_sweep(sweep: PrecheckedSweep) -> list[Arm]:
    """Train all arms.

    Raises UserError before the first one starts, and SystemExit if not all of them finish.
    """
    sweep.folder.path.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):
        sweep.folder.hydra_record.unlink()
    signals = Signals()
    with contextlib.ExitStack() as stack:
        path = hold_folder(
            stack,
            sweep.folder.path,
            has_timestamp=sweep.has_timestamp,
            key="hydra.sweep.dir",
        )
        folder = SweepFolder(path)
        sweep = replace(sweep, folder=folder)
        with record_sweep(folder, list(sweep.arms)):
            arms = make_arms(sweep)
        with handling_signals(signals):
            share_first_stage(folder, arms, signals)
            ArmQueue(arms, sweep.launcher, signals).run()
    summarize(folder, arms, signals)
    return arms


@contextlib.contextmanager
def handling_signals(signals: Signals) -> Iterator[None]:
    """Let `signals` record received signals within the block; restore the handlers afterwards.

    The arms get the signal from ArmQueue, save and exit.
    """
    previous = {}
    for number in INTERRUPTING:
        previous[number] = signal.getsignal(number)
    signals.install()
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def share_first_stage(folder: SweepFolder, arms: list[Arm], signals: Signals) -> None:
    """Train one autoencoder for all arms, if all of them would train the same one.

    If each arm trained its own, their latents could not be compared. Raises SystemExit if the
    training fails.
    """
    first = arms[0]
    stage = first.config.get("first_stage")
    if not stage:
        return
    for arm in arms:
        if arm.config.get("first_stage") != stage or arm.config["data"] != first.config["data"]:
            return
    if not first_stage_done(RunFolder(folder.path)):
        print(f"First stage of all arms: sdtrain experiment={stage['experiment']}", flush=True)
        exit_code = train_first_stage(first.config, first.arguments, folder.path, signals)
        if exit_code:
            raise SystemExit(exit_code)
    autoencoder = str(folder.first_stage.autoencoder.resolve())
    for arm in arms:
        arm.arguments.append(f"model.autoencoder.path={quoted(autoencoder)}")
        arm.config["model"]["autoencoder"]["path"] = autoencoder


def device_slots(launcher: LauncherSettings, configs: list[dict]) -> list[str | None]:
    """Return one entry per arm that may run at once: its CUDA_VISIBLE_DEVICES, or None to leave the
    variable as it is.
    """
    if launcher.devices:
        slots = list(map(str, launcher.devices))
        return slots[: launcher.parallel]
    if launcher.prefix:
        return [None] * (launcher.parallel or len(configs))
    slots = _divide_devices(configs)
    if slots:
        return slots[: launcher.parallel]
    return [None] * (launcher.parallel or 1)


def _divide_devices(configs: list[dict]) -> list[str]:
    """Divide this machine's GPUs into as many CUDA_VISIBLE_DEVICES as the largest arm allows.

    Empty if an arm trains on the CPU or there are too few GPUs.
    """
    per_arm = 1
    for config in configs:
        trainer = config["trainer"]
        if trainer["accelerator"] == "cpu":
            return []
        per_arm = max(per_arm, trainer["devices"])
    count = torch.cuda.device_count() // per_arm
    all_devices = ",".join(map(str, range(count * per_arm)))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", all_devices).split(",")
    slots = []
    for slot in range(count):
        slots.append(",".join(visible[slot * per_arm : (slot + 1) * per_arm]))
    return slots


class ArmQueue:
    """The arms that wait for a free device slot, and those that run.

    Args:
        arms: in the order in which they start.
        launcher: how many run at once, and where.
        signals: what this process has received. The first signal is forwarded to all running arms
            once, and no more arms are started.
    """

    def __init__(self, arms: list[Arm], launcher: LauncherSettings, signals: Signals) -> None:
        self.prefix = launcher.prefix
        self.signals = signals
        self.free_slots = device_slots(launcher, [arm.config for arm in arms])
        self.waiting = list(arms)
        self.shared_training = find_shared_training(arms)
        self.running: list[Arm] = []
        self.forwarded = False

    def run(self) -> None:
        """Return when all arms have ended."""
        self._skip_finished()
        while self.running or self._can_start():
            while self.free_slots and self._can_start():
                self._start_next()
            self._collect_ended()
            self._forward_signal()
            time.sleep(POLL_INTERVAL)

    def _can_start(self) -> bool:
        return self._next() is not None and not self.signals.received

    def _next(self) -> Arm | None:
        """Return the first waiting arm that does not need the training of an unfinished one."""
        for arm in self.waiting:
            first = self.shared_training.get(arm.name)
            if first is None or first.exit_code is not None:
                return arm
        return None

    def _skip_finished(self) -> None:
        for arm in list(self.waiting):
            if is_finished(arm.run):
                self.waiting.remove(arm)
                arm.exit_code = 0
                print(f"{arm.name}: finished earlier", flush=True)

    def _start_next(self) -> None:
        arm = self._next()
        self.waiting.remove(arm)
        first = self.shared_training.get(arm.name)
        if first is not None and first.exit_code:
            arm.exit_code = first.exit_code
            print(f"{arm.name}: not started: it needs the weights of {first.name}", flush=True)
            return
        arm.devices = self.free_slots.pop(0)
        try:
            if first is not None:
                copy_newest_checkpoint(first, arm)
                print(f"{arm.name}: samples with the weights of {first.name}", flush=True)
            arm.start(self.prefix)
        except OSError as error:  # the other arms continue
            arm.exit_code = StorageError.exit_code
            self.free_slots.append(arm.devices)
            reason = f"{error.strerror}: {error.filename}"
            print(f"{arm.name}: cannot start: {reason}", flush=True)
            return
        self.running.append(arm)

    def _collect_ended(self) -> None:
        for arm in list(self.running):
            if arm.process.poll() is None:
                continue
            self.running.remove(arm)
            self.free_slots.append(arm.devices)
            arm.exit_code = arm.process.returncode
            print(f"{arm.name}: {_record_end(arm)}", flush=True)

    def _forward_signal(self) -> None:
        if self.signals.received and not self.forwarded:
            self.forwarded = True
            for arm in self.running:
                arm.process.send_signal(self.signals.received)


def _record_end(arm: Arm) -> str:
    """Return one line on how an arm's process ended.

    Sets the exit code to 1 if the command succeeded although the run has not finished.
    """
    seconds = f"{time.monotonic() - arm.started:.0f} s"
    if arm.exit_code:
        return f"exited with {arm.exit_code} after {seconds}: {arm.failure_reason()}"
    if not is_finished(arm.run):  # the exit code 0 came from the prefix, not from sdtrain
        arm.exit_code = 1
        return (
            f"not finished after {seconds}, although its command has ended. "
            "Set hydra.launcher.prefix to a command that waits for the run."
        )
    return f"finished, {seconds}"


def summarize(folder: SweepFolder, arms: list[Arm], signals: Signals) -> None:
    """Print how the sweep ended, with the finished arms ranked as in sdtrain-report.

    Raises SystemExit after a signal, and with the exit code of the first failed arm.
    """
    finished = [arm for arm in arms if arm.exit_code == 0]
    failed = [arm for arm in arms if arm.exit_code]
    command = f"sdtrain-report {shlex.quote(str(folder.path))}"
    if finished and not signals.received:
        for line in ranking_lines(compare(read_validations(find_runs([folder.path])))):
            print(line, flush=True)
    count = f"{len(finished)} of {len(arms)} arms are finished"
    print(f"{count}. Compare them with: {command}", flush=True)
    if signals.received:
        print("Interrupted: the same command resumes the sweep.", flush=True)
        raise SystemExit(exit_code_of(signals.received))
    if failed:
        names = ", ".join(f"{arm.name} ({arm.exit_code})" for arm in failed)
        line = f"Not finished: {names}. The same command tries them again."
        print(line, file=sys.stderr, flush=True)
        exit_code = failed[0].exit_code
        raise SystemExit(exit_code if exit_code > 0 else 128 - exit_code)
