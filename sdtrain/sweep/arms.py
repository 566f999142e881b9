"""One arm of a sweep: a run in its own process."""

import contextlib
import os
import shlex
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from sdtrain.config.launch import RANK_VARIABLES, RENDEZVOUS_VARIABLES
from sdtrain.runs.layout import RunFolder
from sdtrain.runs.metrics import read_metrics
from sdtrain.runs.resume import arm_digest
from sdtrain.signals import INTERRUPTED
from sdtrain.training.child import CHECKED, child_environment, stop_with_parent, train_command
from sdtrain.training.loggers.wandb_variables import SSH_VARIABLES, VARIABLES

NOT_INHERITED = (*RANK_VARIABLES, *RENDEZVOUS_VARIABLES)
"""Environment variables that an arm does not get: they hold the rank of the sweep's own process."""

GROUP = VARIABLES["group"]

VARIABLES_OVER_SSH = ("CUDA_VISIBLE_DEVICES", CHECKED, *SSH_VARIABLES)

BITS_PER_DIM_KEY = "validation/bits_per_dim"


@dataclass
class Arm:
    """A run of a sweep and the process that trains it.

    Args:
        name: of the arm and of its folder.
        run: the arm's run folder.
        arguments: of the sdtrain command that trains it.
        config: the configuration of its plan.
        process: None until it starts.
        devices: CUDA_VISIBLE_DEVICES of the process; None keeps the value of this process.
        started: time.monotonic() at the start, in seconds.
        earlier_output: bytes that earlier processes wrote to the output file.
        exit_code: None until the process has ended; 0 if the run had finished before this sweep.
    """

    name: str
    run: RunFolder
    arguments: list[str]
    config: dict
    process: subprocess.Popen | None = None
    devices: str | None = None
    started: float = 0.0
    earlier_output: int = 0
    exit_code: int | None = None

    def start(self, prefix: str) -> None:
        """Start or resume the run in a process that ends when this one dies. Raises OSError.

        The output of the process goes to a file in the run folder.
        """
        self.run.path.mkdir(parents=True, exist_ok=True)
        environment = self._environment()
        command = train_command(self.arguments, self.run)
        where = f" on device {self.devices}" if self.devices else ""
        print(f"{self.name}: starts{where}", flush=True)
        self.started = time.monotonic()
        with open(self.run.output, "ab") as output:
            self.earlier_output = output.tell()
            self.process = subprocess.Popen(
                add_prefix(prefix, command, environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                preexec_fn=stop_with_parent,
            )

    def _environment(self) -> dict[str, str]:
        """Return the environment of the arm's process.

        All arms form one group in wandb, which the user may name; by default it is named like the
        sweep's folder.
        """
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
        """Return the error message that the process printed last, or where its output is."""
        if self.exit_code in INTERRUPTED:
            return "interrupted"
        if self.exit_code == -signal.SIGKILL:
            return "killed, perhaps because memory ran out"
        for line in reversed(self._printed_paragraphs()):
            paragraph = line.removeprefix("sdtrain: ").strip()
            if paragraph != self.config["name"]:  # the heading of the run's summary table
                return paragraph
        return f"see {self.run.output}"

    def _printed_paragraphs(self) -> list[str]:
        """Return sdtrain's own messages: the lines of the process's output that begin with
        "sdtrain: ".
        """
        paragraphs = []
        with contextlib.suppress(OSError):
            with open(self.run.output, encoding="utf-8", errors="replace") as output:
                output.seek(self.earlier_output)
                for line in output:
                    if line.startswith("sdtrain: "):
                        paragraphs.append(line)
        return paragraphs

    def bits_per_dimension(self) -> float | None:
        """Return the last bits per dimension measured by a validation, None if there was none."""
        last = None
        for line in read_metrics(self.run.metrics):
            last = line.get(BITS_PER_DIM_KEY, last)
        return last


def add_prefix(prefix: str, command: list[str], environment: dict[str, str]) -> list[str]:
    """Return `command` with the words of hydra.launcher.prefix before it.

    ssh joins its arguments to one line for a remote shell, which starts in another folder and with
    another environment: for ssh, the command changes to this folder and sets the variables first.
    """
    prefix_words = shlex.split(prefix)
    if not prefix_words or Path(prefix_words[0]).name != "ssh":
        return [*prefix_words, *command]
    variables = []
    for key in VARIABLES_OVER_SSH:
        if key in environment:
            variables.append(f"{key}={environment[key]}")
    remote = shlex.join(["env", *variables, *command])
    return [*prefix_words, f"cd {shlex.quote(os.getcwd())} && exec {remote}"]
