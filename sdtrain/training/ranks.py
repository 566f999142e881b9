"""Watches the ranks of a distributed run: all must have the same configuration, and one that hangs,
dies or raises ends the run for all.
"""

import contextlib
import faulthandler
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as L
import torch.distributed as dist
from lightning.pytorch.strategies.launchers import subprocess_script

from sdtrain.config.launch import RANK_0, is_started_by_launcher, is_started_by_rank_0
from sdtrain.errors import DataError, DivergedError, RankError, StorageError, UserError
from sdtrain.runs.layout import RunFolder
from sdtrain.signals import INTERRUPTING, exit_code_of
from sdtrain.training.child import run_dir_override, this_command

GRACE = 5.0
"""Seconds that a rank still has to report its own error, after the problem has been noticed."""

LOST_PEER_WORDS = (
    "gloo",
    "NCCL",
    "Connection closed",
    "Connection reset",
    "Broken pipe",
    "Timed out",
    "timed out",
    "recvValue failed",
    "sendBytes failed",
)
"""Words in the message of a RuntimeError which mean that another rank is gone."""

USER_ERROR_CODES = {kind.exit_code for kind in (UserError, DataError, DivergedError, StorageError)}
"""Exit codes of one rank that become the exit code of the whole run."""


def lost_a_peer(error: BaseException) -> bool:
    """Return whether an error means only that another rank is gone."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in LOST_PEER_WORDS)


class Ranks(L.Callback):
    """Ends the run if a rank has made no optimizer step for `timeout` seconds, or has exited.

    A thread watches, because the main thread may be the one that hangs.

    Args:
        rank: rank of this process.
        timeout: seconds.
        run_dir: where the stacks of a stuck run are written, and the error logs of ranks above 0.
        config: the run's yaml, which must be the same on all ranks.
        precision: trainer.precision, which rank 0 has decided and the ranks that it starts take.
        check_configs: takes the yaml of all ranks, in order; raises if one differs from rank 0's.
        end_process: takes (exit code, paragraph), reports the error and ends this process; called
            on rank 0, or on another rank if rank 0 is dead or stuck.
    """

    def __init__(
        self,
        *,
        rank: int,
        timeout: float,
        run_dir: Path,
        config: str,
        precision: str,
        check_configs: Callable[[list[str]], None],
        end_process: Callable[[int, str], None],
    ) -> None:
        self.rank = rank
        self.timeout = timeout
        self.run = RunFolder(run_dir)
        self.config = config
        self.precision = precision
        self.check_configs = check_configs
        self.end_process = end_process
        self.children: list[subprocess.Popen] = []
        """The other ranks, if this is rank 0 and has started them."""
        self.parent = os.getppid() if is_started_by_rank_0() else None
        """Process id of rank 0, if it has started this process."""
        self.ending = threading.Event()
        self.thread: threading.Thread | None = None
        # A file system's clock may be some milliseconds behind: a log written at once counts too.
        self.began = time.time() - 1.0
        self.world_size = 1
        # Infinite until all ranks have connected, which has a time limit of its own.
        self.last_step = math.inf
        self.images_seen = 0
        # Lightning's own observer kills this process as soon as a child has failed, before anyone
        # could report why.
        assert callable(subprocess_script._launch_process_observer)
        subprocess_script._launch_process_observer = self.watch
        # Lightning's command for the other ranks does not quote the run's folder as Hydra needs it.
        assert callable(subprocess_script._hydra_subprocess_cmd)
        subprocess_script._hydra_subprocess_cmd = self._command
        if not is_started_by_launcher() and not rank:
            os.environ[RANK_0] = str(os.getpid())

    def watch(self, children: list[subprocess.Popen] | None = None) -> None:
        """Start the watching thread, unless it runs already. children: the other ranks."""
        self.children = children or []
        if self.thread is None:
            self.thread = threading.Thread(target=self._watch, name="ranks", daemon=True)
            self.thread.start()

    def _command(self, rank: int) -> tuple[list[str], str]:
        """Return (the command that starts another rank on this machine, its working directory)."""
        words = [f"trainer.precision={self.precision}", run_dir_override(self.run)]
        return [*this_command(), *sys.argv[1:], *words], os.getcwd()

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        # Ranks that torchrun started may each have another folder: the run's is rank 0's.
        self.run = RunFolder(Path(trainer.strategy.broadcast(str(self.run.path))))
        if self.thread is None:
            self.watch()
        self.world_size = trainer.world_size
        if dist.is_initialized():  # a strategy with one process does not initialize it
            configs: list = [None] * self.world_size
            dist.all_gather_object(configs, self.config)
            self.check_configs(configs)
        self.stack_file = open(self.run.stack(self.rank), "w", encoding="utf-8")
        self._restart_clock()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_index: int
    ) -> None:
        self.images_seen = module.progress.images_seen
        self._restart_clock()

    def _restart_clock(self) -> None:
        """Restart the timeout; when it runs out, the stacks of this rank are written."""
        self.last_step = time.monotonic()
        # faulthandler works without the interpreter's lock, which code that hangs may hold.
        faulthandler.dump_traceback_later(self.timeout, file=self.stack_file)

    @property
    def is_orphaned(self) -> bool:
        """Whether rank 0 has started this process and is dead, so that another rank must report
        the error.
        """
        return self.parent is not None and os.getppid() != self.parent

    def finish(self) -> None:
        """Stop watching; call it before this process exits.

        Rank 0 waits up to GRACE seconds for the other ranks to exit, and then kills them.
        """
        self.ending.set()
        faulthandler.cancel_dump_traceback_later()
        self._remove_empty_stacks(self.rank)
        end = time.monotonic() + GRACE
        for child in self.children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, end - time.monotonic()))
            child.kill()
        if self.children:
            self._remove_empty_stacks("*")

    def explain(self, error: Exception | None) -> tuple[int, str]:
        """Return (exit code, paragraph) for an error that the user did not cause.

        error: None if another rank has exited. That rank's exit code is kept if it reported a
        UserError.
        """
        self.ending.set()
        if error is not None and not lost_a_peer(error):
            message = f"{type(error).__name__}: {error}"
            if self.rank:
                # Not RankError's code, which from a rank above 0 means that the error is another's.
                return 1, message
            return RankError.exit_code, f"On rank 0: {message}"
        failed = self._first_to_fail()
        if failed is not None:
            return self._explain_exit(*failed)
        reason = error or "one of them lost its peers"
        paragraph = (
            f"Rank {self.rank} has lost its connection to the others at {self.images_seen} images: "
            f"{reason}"
        )
        return RankError.exit_code, paragraph

    def _watch(self) -> None:
        """Watch the other ranks until the run ends; this is what the thread runs."""
        grace = min(GRACE, self.timeout)
        while not self.ending.wait(min(0.2, self.timeout / 10)):
            if any(child.poll() for child in self.children):
                # The main thread may notice it too; then it reports the error and sets `ending`.
                if not self.ending.wait(grace):
                    self._end_run(*self.explain(None))
            elif time.monotonic() - self.last_step > self.timeout:
                # Rank 0 ends the run first, unless rank 0 itself is stuck.
                if not self.ending.wait(grace if self.rank else 1.0):
                    self._end_run(RankError.exit_code, self._explain_hang())

    def _first_to_fail(self) -> tuple[int, int] | None:
        """Return (rank, exit code) of a rank that has exited because of its own error, or None.

        Waits up to GRACE seconds for one.
        """
        end = time.monotonic() + min(GRACE, self.timeout)
        while time.monotonic() < end:
            codes = [child.poll() for child in self.children]
            for rank, code in enumerate(codes, 1):
                if code not in (None, RankError.exit_code):
                    return rank, code
            if None not in codes:
                return None
            time.sleep(0.05)
        return None

    def _explain_exit(self, rank: int, code: int) -> tuple[int, str]:
        """Return (exit code, paragraph) for a rank above 0 that has exited with `code`."""
        seen = self.images_seen
        if -code in INTERRUPTING:
            # The signal came before the rank had a handler: there is nothing to save yet.
            name = signal.Signals(-code).name
            paragraph = (
                f"Rank {rank} was ended by {name} while it started. Resume with resume=auto."
            )
            return exit_code_of(-code), paragraph
        log = self.run.error_log(rank)
        if code < 0:
            reason = f"Rank {rank} was killed by {signal.Signals(-code).name} at {seen} images."
        elif log.exists() and log.stat().st_mtime >= self.began:
            first_line = log.read_text(encoding="utf-8").splitlines()[0]
            reason = f"At {seen} images, on rank {rank}: {first_line}"
        else:
            reason = f"Rank {rank} exited with code {code} at {seen} images."
        return code if code in USER_ERROR_CODES else RankError.exit_code, reason

    def _explain_hang(self) -> str:
        positions = []
        for rank in range(self.world_size):
            positions.append(f"rank {rank} {self._position(rank)}")
        return (
            f"No optimizer step has ended for {self.timeout:g} s, at {self.images_seen} images: "
            f"{'; '.join(positions)}. The stacks are in {self.run.stack('*')}. "
            "If a step can take that long, raise strategy.timeout."
        )

    def _position(self, rank: int) -> str:
        """Return the innermost line of code of a rank's main thread.

        If that is in torch or Lightning, also the innermost line outside of them.
        """
        stack = self.run.stack(rank).read_text(encoding="utf-8", errors="replace")
        main_thread = stack.rpartition("hread 0x")[2]  # faulthandler writes the main thread last
        frames = re.findall(r'File "(.+)", line (\d+) in (\S+)', main_thread)
        if not frames:
            return "does not respond"
        file, line, name = frames[0]
        position = f"at {file} line {line}, in {name}"
        for caller_file, caller_line, _ in frames:
            if not {"torch", "lightning"} & set(Path(caller_file).parts):
                if (caller_file, caller_line) != (file, line):
                    position += f", from {caller_file} line {caller_line}"
                break
        return position

    def _end_run(self, code: int, paragraph: str) -> None:
        """Kill the other ranks, then end this process."""
        for child in self.children:
            child.kill()
            child.wait()
        if self.parent and not self.is_orphaned:
            # Rank 0 should have ended this process by now: it is stuck and cannot end itself.
            os.kill(self.parent, signal.SIGKILL)
            while not self.is_orphaned:
                time.sleep(0.01)
        self._remove_empty_stacks("*")
        self.end_process(code, paragraph)

    def _remove_empty_stacks(self, rank: int | str) -> None:
        """Remove the stack files of a rank, or of all ranks for "*", that are empty."""
        for path in self.run.path.glob(self.run.stack(rank).name):
            with contextlib.suppress(OSError):
                if not path.stat().st_size:
                    path.unlink()
