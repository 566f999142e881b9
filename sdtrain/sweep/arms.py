"""One arm of a sweep: a run in a process of its own."""

import contextlib
import os
import shlex
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from sdtrain.config.launch import MEETING_POINT, RANK_VARIABLES
from sdtrain.runs.layout import RunFolder
from sdtrain.runs.metrics import read_metrics
from sdtrain.runs.resume import arm_digest
from sdtrain.signals import INTERRUPTED
from sdtrain.training.child import CHECKED, child_environment, stop_with_parent, train_command
from sdtrain.training.loggers.wandb_variables import SSH_VARIABLES, VARIABLES

NOT_INHERITED = (*RANK_VARIABLES, *MEETING_POINT)
"""Where this process stands among others is nothing to its arms."""

GROUP = VARIABLES["group"]

KEPT_BY_SSH = ("CUDA_VISIBLE_DEVICES", CHECKED, *SSH_VARIABLES)

MEASURE = "validation/bits_per_dim"


@dataclass
class Arm:
    """A run of a sweep, and the process that trains it.

    Args:
        name: also of its folder.
        words: what sdtrain is given.
        config: of its plan.
        process: None until it starts.
        devices: CUDA_VISIBLE_DEVICES of the process, None where that is left as it is.
        started: by time.monotonic, in seconds.
        earlier_output: bytes that earlier processes have printed.
        exit_code: None until it has ended; 0 if it had finished before this sweep.
    """

    name: str
    run: RunFolder
    words: list[str]
    config: dict
    process: subprocess.Popen | None = None
    devices: str | None = None
    started: float = 0.0
    earlier_output: int = 0
    exit_code: int | None = None

    def start(self, prefix: str) -> None:
        """Begins the run, or goes on with it, in a process that ends with this one. Raises OSError.

        What it prints goes to a file in its folder.
        """
        self.run.path.mkdir(parents=True, exist_ok=True)
        environment = self._environment()
        command = train_command(self.words, self.run)
        place = f" on device {self.devices}" if self.devices else ""
        print(f"{self.name}: starts{place}", flush=True)
        self.started = time.monotonic()
        with open(self.run.output, "ab") as output:
            self.earlier_output = output.tell()
            self.process = subprocess.Popen(
                prefixed(prefix, command, environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                preexec_fn=stop_with_parent,
            )

    def _environment(self) -> dict[str, str]:
        """This process's, with the arms as one group in wandb: the user's, or the sweep's name."""
        environment = child_environment(self.name)
        for variable in NOT_INHERITED:
            environment.pop(variable, None)
        environment[CHECKED] = arm_digest(self.config)
        if not environment.get(GROUP):
            environment[GROUP] = self.run.path.resolve().parent.name
        if self.devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.devices
        return environment

    def failure_reason(self) -> str:
        """The paragraph that its process has left with, or the file with its output."""
        if self.exit_code in INTERRUPTED:
            return "interrupted"
        if self.exit_code == -signal.SIGKILL:
            return "killed, perhaps because memory was short"
        paragraphs = []
        with contextlib.suppress(OSError):
            with open(self.run.output, encoding="utf-8", errors="replace") as output:
                output.seek(self.earlier_output)
                paragraphs = [line for line in output if line.startswith("sdtrain: ")]
        for line in reversed(paragraphs):
            paragraph = line.removeprefix("sdtrain: ").strip()
            if paragraph != self.config["name"]:  # the head of a run's table
                return paragraph
        return f"see {self.run.output}"

    def bits_per_dimension(self) -> float | None:
        """The last that was measured, None where none was."""
        found = None
        for line in read_metrics(self.run.metrics):
            found = line.get(MEASURE, found)
        return found


def prefixed(prefix: str, command: list[str], environment: dict[str, str]) -> list[str]:
    """The words that start a command behind the words of hydra.launcher.prefix.

    ssh joins its words to one line for a remote shell, which knows neither this folder nor this
    environment.
    """
    before = shlex.split(prefix)
    if not before or Path(before[0]).name != "ssh":
        return [*before, *command]
    known = [f"{key}={environment[key]}" for key in KEPT_BY_SSH if key in environment]
    remote = shlex.join(["env", *known, *command])
    return [*before, f"cd {shlex.quote(os.getcwd())} && exec {remote}"]
