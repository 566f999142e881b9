"""Several ranks: they start alike, and one that hangs, dies or raises ends the run for all."""

import contextlib
import faulthandler
import math
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as L
import torch.distributed as dist
from lightning.pytorch.strategies.launchers import subprocess_script

from sdtrain.errors import RankError
from sdtrain.runs.layout import RunFolder

GRACE = 5.0  # seconds in which a rank may still say for itself what has happened to it


def lost_a_peer(error: BaseException) -> bool:
    """Whether an error says no more than that another rank is gone."""
    words = (
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
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


class Ranks(L.Callback):
    """Ends the run where a rank makes no step for `timeout` seconds, or has ended. A thread watches, because the main one may be what hangs.

    Args:
        rank: this process's. timeout: seconds.
        run_dir: where the stacks of a stuck run go, as stuck-rank-N.txt, and where ranks above 0 leave their error logs.
        config: the run's yaml, which has to be the same on all ranks. compare: raises where rank 0's (first) differs from another's.
        leave: (exit code, paragraph), says it and ends this process; called on rank 0, and on another where rank 0 answers no more.
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
        self.timeout, self.run_dir, self.config, self.compare, self.leave = (
            timeout,
            run_dir,
            config,
            compare,
            leave,
        )
        self.rank, self.children, self.over, self.thread = rank, [], threading.Event(), None
        self.launcher = (
            os.getppid() if rank and "TORCHELASTIC_RUN_ID" not in os.environ else None
        )  # rank 0 has started this one
        self.began, self.last, self.images_seen = (
            time.time(),
            math.inf,
            0,
        )  # of the last step: the ranks' meeting has its own limit
        # Lightning's own observer kills this process as soon as a child has failed, before anybody has said why.
        assert callable(subprocess_script._launch_process_observer)
        subprocess_script._launch_process_observer = self.watch

    def watch(self, children: list | None = None) -> None:
        self.children = children or []
        if self.thread is None:
            self.thread = threading.Thread(target=self._watch, name="ranks", daemon=True)
            self.thread.start()

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self.run_dir = Path(
            trainer.strategy.broadcast(str(self.run_dir))
        )  # torchrun's ranks have folders of their own
        if self.thread is None:
            self.watch()
        configs: list = [None] * trainer.world_size
        dist.all_gather_object(configs, self.config)
        self.compare(configs)
        self.stack = open(self._stack_of(self.rank), "w", encoding="utf-8")
        self._made_a_step()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_index: int
    ) -> None:
        self.images_seen = module.progress.images_seen
        self._made_a_step()

    def _made_a_step(self) -> None:
        self.last = time.monotonic()
        # By a thread that is not Python's: foreign code may be stuck with the interpreter's lock in its hands.
        faulthandler.dump_traceback_later(self.timeout, file=self.stack)

    def _stack_of(self, rank: int | str) -> Path:
        return RunFolder(self.run_dir).stack(rank)

    def _sweep(self, rank: int | str) -> None:
        """Removes the files in which there is no stack."""
        for path in self.run_dir.glob(self._stack_of(rank).name):
            with contextlib.suppress(OSError):
                if not path.stat().st_size:
                    path.unlink()

    @property
    def orphaned(self) -> bool:
        """Whether rank 0 is dead, so that somebody else has to say what has happened."""
        return self.launcher is not None and os.getppid() != self.launcher

    def finish(self) -> None:
        """Before rank 0 leaves: the others may take a moment to do so, and are given no more."""
        self.over.set()
        faulthandler.cancel_dump_traceback_later()
        self._sweep(self.rank)
        end = time.monotonic() + GRACE
        for child in self.children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, end - time.monotonic()))
            child.kill()
        if self.children:
            self._sweep("*")

    def _watch(self) -> None:
        grace = min(GRACE, self.timeout)
        while not self.over.wait(min(0.2, self.timeout / 10)):
            if any(child.poll() for child in self.children):
                if not self.over.wait(grace):  # else the main thread has noticed, and says it
                    self._end(*self.verdict(None))
            elif time.monotonic() - self.last > self.timeout:
                if not self.over.wait(
                    grace if self.rank else 1.0
                ):  # by now rank 0 has ended the run, unless it is what is stuck
                    self._end(RankError.exit_code, self._stuck())

    def _place(self, rank: int) -> str:
        """Where a rank's main thread stands: its innermost line of code, and that outside of torch and Lightning which has led there."""
        stack = self._stack_of(rank).read_text(encoding="utf-8", errors="replace")
        frames = re.findall(
            r'File "(.+)", line (\d+) in (\S+)', stack.rpartition("hread 0x")[2]
        )  # the main one is the last
        if not frames:
            return "gives no sign of life"
        file, line, name = frames[0]
        outside = next(
            (frame for frame in frames if not {"torch", "lightning"} & set(Path(frame[0]).parts)),
            frames[0],
        )
        return f"at {file} line {line}, in {name}" + (
            f", from {outside[0]} line {outside[1]}" if outside != frames[0] else ""
        )

    def _stuck(self) -> str:
        places = "; ".join(
            f"rank {rank} {self._place(rank)}" for rank in range(int(os.environ["WORLD_SIZE"]))
        )
        return (
            f"No optimizer step has ended for {self.timeout:g} s, at {self.images_seen} images: {places}. The stacks are in "
            f"{self.run_dir}/stuck-rank-*.txt. If steps do take that long, raise strategy.timeout."
        )

    def verdict(self, error: Exception | None) -> tuple[int, str]:
        """(exit code, paragraph) for an error that is nobody's mistake, or for None: a rank has ended. What a rank above 0 has said of a
        mistake of the user's keeps its code."""
        self.over.set()
        if error is not None and not lost_a_peer(error):
            # Code 6 from a rank above 0 means that it has lost another: it is not the one to blame.
            return (
                (1, f"{type(error).__name__}: {error}")
                if self.rank
                else (RankError.exit_code, f"On rank 0: {type(error).__name__}: {error}")
            )
        end, ended = time.monotonic() + min(GRACE, self.timeout), []
        while not ended and time.monotonic() < end:
            codes = [child.poll() for child in self.children]
            ended = [
                (rank, code)
                for rank, code in enumerate(codes, 1)
                if code not in (None, RankError.exit_code)
            ]
            if None not in codes:
                break
            time.sleep(0.05)
        if not ended:
            return (
                RankError.exit_code,
                f"Rank {self.rank} has lost the others at {self.images_seen} images: {error or 'one of them lost its peers'}",
            )
        rank, code = ended[0]
        log = RunFolder(self.run_dir).error_log(rank)
        if -code in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            # Before it listened: there is nothing to save yet.
            return (
                130 if -code == signal.SIGINT else 143,
                f"Rank {rank} was ended by {signal.Signals(-code).name} while it started. Go on with resume=auto.",
            )
        if code < 0:
            said = f"Rank {rank} was killed by {signal.Signals(-code).name} at {self.images_seen} images."
        elif log.exists() and log.stat().st_mtime >= self.began:
            said = f"At {self.images_seen} images, on rank {rank}: {log.read_text(encoding='utf-8').splitlines()[0]}"
        else:
            said = f"Rank {rank} left with exit code {code} at {self.images_seen} images."
        return code if code in (2, 3, 4, 5) else RankError.exit_code, said

    def _end(self, code: int, paragraph: str) -> None:
        for child in self.children:
            child.kill()
            child.wait()
        if self.launcher and not self.orphaned:
            os.kill(
                self.launcher, signal.SIGKILL
            )  # rank 0 should have ended this one by now: it is stuck beyond help
            while not self.orphaned:
                time.sleep(0.01)
        self._sweep("*")
        self.leave(code, paragraph)
