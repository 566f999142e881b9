"""Runs the arms of a sweep, side by side where there are devices for it.

Arms that have finished before are left as they are, those that were stopped go on.
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
from sdtrain.sweep.check import check_arms
from sdtrain.sweep.draft import SweepDraft
from sdtrain.sweep.places import Places
from sdtrain.sweep.record import recorded
from sdtrain.sweep.sharing import hand_over, trained_by
from sdtrain.training.first_stage import first_stage_done, train_first_stage

POLL = 0.05  # seconds between two looks at the processes


def run_sweep(sweep: SweepDraft) -> list[Arm]:
    """Trains all arms.

    Raises UserError before the first starts, SystemExit where not all of them have finished.
    """
    sweep.folder.path.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):
        sweep.folder.hydra_record.unlink()
    signals = Signals()
    with contextlib.ExitStack() as held:
        moment = sweep.is_of_this_moment
        place = sweep.folder.path
        place = hold_folder(held, place, is_of_this_moment=moment, key="hydra.sweep.dir")
        folder = SweepFolder(place)
        sweep = replace(sweep, folder=folder)
        with recorded(folder, list(sweep.arms)):
            arms = check_arms(sweep)
        with received_by(signals):
            share_first_stage(folder, arms, signals)
            ArmQueue(arms, sweep.places, signals).run()
    leave_unless_finished(folder, arms, signals)
    return arms


@contextlib.contextmanager
def received_by(signals: Signals) -> Iterator[None]:
    """Until the block ends, `signals` remembers a signal, on which arms save and leave."""
    before = {number: signal.getsignal(number) for number in INTERRUPTING}
    signals.install()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def share_first_stage(folder: SweepFolder, arms: list[Arm], signals: Signals) -> None:
    """Trains one autoencoder for all arms that would train the same one.

    With one each, their latents could not be compared. Raises SystemExit where its training fails.
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
        code = train_first_stage(first.config, first.words, folder.path, signals)
        if code:
            raise SystemExit(code)
    autoencoder = str(folder.first_stage.autoencoder.resolve())
    for arm in arms:
        arm.words.append(f"model.autoencoder.path={quoted(autoencoder)}")
        arm.config["model"]["autoencoder"]["path"] = autoencoder


def device_sets(places: Places, configs: list[dict]) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES for each arm that may run at once, None where it is left as it is."""
    if places.devices:
        return [str(devices) for devices in places.devices][: places.parallel]
    if places.prefix:
        return [None] * (places.parallel or len(configs))
    trainers = [config["trainer"] for config in configs]
    each = max(trainer["devices"] for trainer in trainers)
    on_cpu = any(trainer["accelerator"] == "cpu" for trainer in trainers)
    count = 0 if on_cpu else torch.cuda.device_count() // each
    all_devices = ",".join(str(number) for number in range(count * each))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", all_devices).split(",")
    shares = [",".join(visible[place * each : (place + 1) * each]) for place in range(count)]
    return shares[: places.parallel] or [None] * (places.parallel or 1)


class ArmQueue:
    """The arms that wait for a place, and those that run.

    Args:
        arms: in the order in which they start.
        places: how many run at once, and where.
        signals: what this process has received. It is handed on once to all that run, and no
            more are started.
    """

    def __init__(self, arms: list[Arm], places: Places, signals: Signals) -> None:
        self.prefix = places.prefix
        self.signals = signals
        self.free = device_sets(places, [arm.config for arm in arms])
        self.waiting = list(arms)
        self.trained_by = trained_by(arms)
        self.running: list[Arm] = []
        self.forwarded = False

    def run(self) -> None:
        """Until all arms have ended."""
        self._pass_over_finished()
        while self.running or self._can_start():
            while self.free and self._can_start():
                self._start_next()
            self._collect_ended()
            self._forward_signal()
            time.sleep(POLL)

    def _can_start(self) -> bool:
        return self._next() is not None and not self.signals.received

    def _next(self) -> Arm | None:
        """The first that waits for no other's training."""
        for arm in self.waiting:
            first = self.trained_by.get(arm.name)
            if first is None or first.exit_code is not None:
                return arm
        return None

    def _pass_over_finished(self) -> None:
        for arm in list(self.waiting):
            if is_finished(arm.run):
                self.waiting.remove(arm)
                arm.exit_code = 0
                print(f"{arm.name}: done before", flush=True)

    def _start_next(self) -> None:
        arm = self._next()
        self.waiting.remove(arm)
        first = self.trained_by.get(arm.name)
        if first is not None and first.exit_code:
            arm.exit_code = first.exit_code
            print(f"{arm.name}: not begun, {first.name} was to train for it", flush=True)
            return
        arm.devices = self.free.pop(0)
        try:
            if first is not None:
                hand_over(first, arm)
                print(f"{arm.name}: draws with the weights of {first.name}", flush=True)
            arm.start(self.prefix)
        except OSError as error:  # the others go on
            arm.exit_code = StorageError.exit_code
            self.free.append(arm.devices)
            place = f"{error.strerror}: {error.filename}"
            print(f"{arm.name}: cannot start: {place}", flush=True)
            return
        self.running.append(arm)

    def _collect_ended(self) -> None:
        for arm in list(self.running):
            if arm.process.poll() is None:
                continue
            self.running.remove(arm)
            self.free.append(arm.devices)
            arm.exit_code = arm.process.returncode
            print(f"{arm.name}: {_how_it_ended(arm)}", flush=True)

    def _forward_signal(self) -> None:
        if self.signals.received and not self.forwarded:
            self.forwarded = True
            for arm in self.running:
                arm.process.send_signal(self.signals.received)


def _how_it_ended(arm: Arm) -> str:
    """One line on an arm whose process has ended.

    The exit code becomes 1 where the command has ended before the run.
    """
    seconds = f"{time.monotonic() - arm.started:.0f} s"
    if arm.exit_code:
        return f"left with {arm.exit_code} after {seconds}: {arm.failure_reason()}"
    if not is_finished(arm.run):  # what was seen is the prefix's own exit code
        arm.exit_code = 1
        return (
            f"not finished after {seconds}, though its command has ended. "
            "Give a hydra.launcher.prefix that waits."
        )
    return f"finished, {seconds}"


def leave_unless_finished(folder: SweepFolder, arms: list[Arm], signals: Signals) -> None:
    """Prints how the sweep has ended, and ranks its arms as sdtrain-report does.

    Raises SystemExit after a signal, and with the code of the first arm that failed.
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
        print("Interrupted: the same command goes on.", flush=True)
        raise SystemExit(exit_code_of(signals.received))
    if failed:
        names = ", ".join(f"{arm.name} ({arm.exit_code})" for arm in failed)
        line = f"Not finished: {names}. The same command tries them again."
        print(line, file=sys.stderr, flush=True)
        code = failed[0].exit_code
        raise SystemExit(code if code > 0 else 128 - code)
