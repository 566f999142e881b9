"""Several ranks: they start alike, and one that hangs, dies or raises ends the run for all."""

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
from sdtrain.training.child import run_dir_word, this_command

GRACE = 5.0
"""Seconds in which a rank may still report what has happened to it."""

LOST_PEER = (
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
"""Words of a RuntimeError by which a rank learns that another is gone."""

MISTAKES = {kind.exit_code for kind in (UserError, DataError, DivergedError, StorageError)}
"""Exit codes of a rank that the whole run leaves with."""


def lost_a_peer(error: BaseException) -> bool:
    """Whether an error tells only that another rank is gone."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in LOST_PEER)


class Ranks(L.Callback):
    """Ends the run where a rank makes no step for `timeout` seconds, or has ended.

    A thread watches, because the main one may be what hangs.

    Args:
        rank: this process's.
        timeout: seconds.
        run_dir: where the stacks of a stuck run go, and where ranks above 0 leave their error logs.
        config: the run's yaml, which has to be the same on all ranks.
        compare: raises where rank 0's yaml, the first, differs from another's.
        leave: (exit code, paragraph), reports it and ends this process; called on rank 0, and on
            another where rank 0 is dead or stuck.
    """

    def __init__(
        self,
        *,
        rank: int,
        timeout: float,
        run_dir: Path,
        config: str,
        compare: Callable[[list[str]], None],
        leave: Callable[[int, str], None],
    ) -> None:
        self.rank = rank
        self.timeout = timeout
        self.run = RunFolder(run_dir)
        self.config = config
        self.compare = compare
        self.leave = leave
        self.children: list[subprocess.Popen] = []
        """The other ranks, where this is rank 0 and has started them."""
        self.launcher = os.getppid() if is_started_by_rank_0() else None
        """Process id of rank 0, where it has started this one."""
        self.ending = threading.Event()
        self.thread: threading.Thread | None = None
        self.began = time.time()
        self.world = 1
        self.last_step = math.inf  # the ranks' first meeting has a limit of its own
        self.images_seen = 0
        # Lightning's own observer kills this process as soon as a child has failed: nobody could
        # report why.
        assert callable(subprocess_script._launch_process_observer)
        subprocess_script._launch_process_observer = self.watch
        # And its command for the other ranks puts the run's folder in quotes of its own.
        assert callable(subprocess_script._hydra_subprocess_cmd)
        subprocess_script._hydra_subprocess_cmd = self._command
        if not is_started_by_launcher() and not rank:
            os.environ[RANK_0] = str(os.getpid())

    def watch(self, children: list[subprocess.Popen] | None = None) -> None:
        """Starts the thread, once."""
        self.children = children or []
        if self.thread is None:
            self.thread = threading.Thread(target=self._watch, name="ranks", daemon=True)
            self.thread.start()

    def _command(self, rank: int) -> tuple[list[str], str]:
        """(the command that starts another rank of this machine, the folder in which it does)."""
        return [*this_command(), *sys.argv[1:], run_dir_word(self.run)], os.getcwd()

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        # torchrun's ranks have folders of their own: rank 0's is the run's.
        self.run = RunFolder(Path(trainer.strategy.broadcast(str(self.run.path))))
        if self.thread is None:
            self.watch()
        self.world = trainer.world_size
        if dist.is_initialized():  # not by a strategy of one process
            configs: list = [None] * self.world
            dist.all_gather_object(configs, self.config)
            self.compare(configs)
        self.stack = open(self.run.stack(self.rank), "w", encoding="utf-8")
        self._note_step()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_index: int
    ) -> None:
        self.images_seen = module.progress.images_seen
        self._note_step()

    def _note_step(self) -> None:
        self.last_step = time.monotonic()
        # Not by a thread of Python's: foreign code may hang while it holds the interpreter's lock.
        faulthandler.dump_traceback_later(self.timeout, file=self.stack)

    @property
    def orphaned(self) -> bool:
        """Whether rank 0 is dead, so that another has to report what has happened."""
        return self.launcher is not None and os.getppid() != self.launcher

    def finish(self) -> None:
        """To be called before this process leaves.

        Rank 0 gives the others a moment to leave too, and then kills them.
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
        """(exit code, paragraph) for an error that is no mistake of the user's.

        error: None where another rank has ended. Its code is kept where it reported a mistake of
        the user's.
        """
        self.ending.set()
        if error is not None and not lost_a_peer(error):
            described = f"{type(error).__name__}: {error}"
            if self.rank:
                # Code 6 from a rank above 0 means that it has lost another: it is not to blame.
                return 1, described
            return RankError.exit_code, f"On rank 0: {described}"
        ended = self._first_to_end()
        if ended is not None:
            return self._explain_end(*ended)
        reason = error or "one of them lost its peers"
        lost = f"Rank {self.rank} has lost the others at {self.images_seen} images: {reason}"
        return RankError.exit_code, lost

    def _watch(self) -> None:
        """The thread's work: looks after the other ranks until the run ends."""
        grace = min(GRACE, self.timeout)
        while not self.ending.wait(min(0.2, self.timeout / 10)):
            if any(child.poll() for child in self.children):
                # Unless the main thread has noticed too, and reports it.
                if not self.ending.wait(grace):
                    self._end_run(*self.explain(None))
            elif time.monotonic() - self.last_step > self.timeout:
                # Rank 0 ends the run first, unless it is itself what is stuck.
                if not self.ending.wait(grace if self.rank else 1.0):
                    self._end_run(RankError.exit_code, self._explain_hang())

    def _first_to_end(self) -> tuple[int, int] | None:
        """(rank, exit code) of a rank that has ended for a reason of its own, or None.

        Waits a moment for it.
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

    def _explain_end(self, rank: int, code: int) -> tuple[int, str]:
        """(exit code, paragraph) where a rank above 0 has left with `code`."""
        seen = self.images_seen
        if -code in INTERRUPTING:
            # Before it handled signals itself: there is nothing to save yet.
            name = signal.Signals(-code).name
            ended = f"Rank {rank} was ended by {name} while it started. Go on with resume=auto."
            return exit_code_of(-code), ended
        log = self.run.error_log(rank)
        if code < 0:
            reason = f"Rank {rank} was killed by {signal.Signals(-code).name} at {seen} images."
        elif log.exists() and log.stat().st_mtime >= self.began:
            first_line = log.read_text(encoding="utf-8").splitlines()[0]
            reason = f"At {seen} images, on rank {rank}: {first_line}"
        else:
            reason = f"Rank {rank} left with exit code {code} at {seen} images."
        return code if code in MISTAKES else RankError.exit_code, reason

    def _explain_hang(self) -> str:
        places = "; ".join(f"rank {rank} {self._position(rank)}" for rank in range(self.world))
        return (
            f"No optimizer step has ended for {self.timeout:g} s, at {self.images_seen} images: "
            f"{places}. The stacks are in {self.run.stack('*')}. "
            "If steps do take that long, raise strategy.timeout."
        )

    def _position(self, rank: int) -> str:
        """Where a rank's main thread stands: its innermost line of code.

        Where that is in torch or Lightning, the line outside of them that led there too.
        """
        stack = self.run.stack(rank).read_text(encoding="utf-8", errors="replace")
        main_thread = stack.rpartition("hread 0x")[2]  # it is written last
        frames = re.findall(r'File "(.+)", line (\d+) in (\S+)', main_thread)
        if not frames:
            return "gives no sign of life"
        file, line, name = frames[0]
        position = f"at {file} line {line}, in {name}"
        for outer_file, outer_line, _ in frames:
            if not {"torch", "lightning"} & set(Path(outer_file).parts):
                if (outer_file, outer_line) != (file, line):
                    position += f", from {outer_file} line {outer_line}"
                break
        return position

    def _end_run(self, code: int, paragraph: str) -> None:
        """Ends the other ranks, then this process."""
        for child in self.children:
            child.kill()
            child.wait()
        if self.launcher and not self.orphaned:
            # Rank 0 should have ended this one by now: it is stuck, and cannot end itself.
            os.kill(self.launcher, signal.SIGKILL)
            while not self.orphaned:
                time.sleep(0.01)
        self._remove_empty_stacks("*")
        self.leave(code, paragraph)

    def _remove_empty_stacks(self, rank: int | str) -> None:
        """Removes the files that no stack was written to."""
        for path in self.run.path.glob(self.run.stack(rank).name):
            with contextlib.suppress(OSError):
                if not path.stat().st_size:
                    path.unlink()
