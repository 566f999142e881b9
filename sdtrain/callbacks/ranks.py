"""Several ranks: they start alike, and one that hangs, dies or raises ends the run for all."""

import contextlib
import faulthandler
import math
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as L
import torch.distributed as dist
from lightning.pytorch.strategies.launchers import subprocess_script

from sdtrain.errors import RankError
from sdtrain.paths import error_log

GRACE = 5.0  # seconds in which a rank may still say for itself what has happened to it


def lost_a_peer(error: BaseException) -> bool:
    """Whether an error says no more than that another rank is gone."""
    words = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe", "Timed out", "timed out", "recvValue failed", "sendBytes failed")
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))


class Ranks(L.Callback):
    """Ends the run where a rank makes no step for `timeout` seconds, or has ended. A thread watches, because the main one may be what hangs.

    Args:
        rank: this process's. timeout: seconds.
        run_dir: where stacks go, as stuck-rank-N.txt, and where ranks above 0 leave their error logs.
        config: the run's yaml, which has to be the same on all ranks. compare: raises where rank 0's (first) differs from another's.
        leave: (exit code, paragraph), says it and ends this process; called on rank 0, and on another where rank 0 answers no more.
    """

    def __init__(
        self, *, rank: int, timeout: float, run_dir: Path, config: str, compare: Callable[[list[str]], None], leave: Callable[[int, str], None],
    ) -> None:
        self.timeout, self.run_dir, self.config, self.compare, self.leave = timeout, run_dir, config, compare, leave
        self.rank, self.children, self.over, self.thread = rank, [], threading.Event(), None
        self.launcher = os.getppid() if rank and "TORCHELASTIC_RUN_ID" not in os.environ else None  # rank 0 has started this one
        self.began, self.last, self.images_seen = time.time(), math.inf, 0  # of the last step: the ranks' meeting has its own limit
        # Lightning's own observer kills this process as soon as a child has failed, before anybody has said why.
        assert callable(subprocess_script._launch_process_observer)
        subprocess_script._launch_process_observer = self.watch

    def watch(self, children: list | None = None) -> None:
        self.children = children or []
        if self.thread is None:
            self.thread = threading.Thread(target=self._watch, name="ranks", daemon=True)
            self.thread.start()

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self.run_dir = Path(trainer.strategy.broadcast(str(self.run_dir)))  # torchrun's ranks have folders of their own
        if self.thread is None:
            self.watch()
        configs: list = [None] * trainer.world_size
        dist.all_gather_object(configs, self.config)
        self.compare(configs)
        self.last = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_index: int) -> None:
        self.last, self.images_seen = time.monotonic(), trainer.datamodule.images_seen

    @property
    def orphaned(self) -> bool:
        """Whether rank 0 is dead, so that somebody else has to say what has happened."""
        return self.launcher is not None and os.getppid() != self.launcher

    def finish(self) -> None:
        """Before rank 0 leaves: the others may take a moment to do so, and are given no more."""
        self.over.set()
        end = time.monotonic() + GRACE
        for child in self.children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, end - time.monotonic()))
            child.kill()

    def _watch(self) -> None:
        grace = min(GRACE, self.timeout)
        while not self.over.wait(min(0.2, self.timeout / 10)):
            if any(child.poll() for child in self.children):
                if not self.over.wait(grace):  # else the main thread has noticed, and says it
                    self._end(*self.verdict(None))
            elif time.monotonic() - self.last > self.timeout:
                self._write_stack()
                if not self.over.wait(grace if self.rank else 1.0):  # by now rank 0 has ended the run, unless it is what is stuck
                    self._end(RankError.exit_code, self._stuck())

    def _write_stack(self) -> None:
        with open(self.run_dir / f"stuck-rank-{self.rank}.txt", "w", encoding="utf-8") as file:
            file.write(f"{self._place()}\n")
            file.flush()
            faulthandler.dump_traceback(file)

    def _place(self) -> str:
        """Where the main thread stands: its innermost line of code that is not torch's or Lightning's, where there is one."""
        frames = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident])
        outside = [frame for frame in frames if not {"torch", "lightning"} & set(Path(frame.filename).parts)]
        frame = frames[-1]
        within = "" if outside[-1:] == [frame] else f", from {outside[-1].filename} line {outside[-1].lineno}" if outside else ""
        return f"{frame.filename} line {frame.lineno}, in {frame.name}{within}"

    def _stuck(self) -> str:
        places = []
        for rank in range(int(os.environ["WORLD_SIZE"])):
            stack = self.run_dir / f"stuck-rank-{rank}.txt"
            written = stack.exists() and stack.stat().st_mtime >= self.began
            places.append(f"rank {rank} at {stack.read_text(encoding='utf-8').splitlines()[0]}" if written else f"rank {rank} gives no sign of life")
        return (
            f"No optimizer step has ended for {self.timeout:g} s, at {self.images_seen} images: {'; '.join(places)}. The stacks are in "
            f"{self.run_dir}/stuck-rank-*.txt. If steps do take that long, raise strategy.timeout."
        )

    def verdict(self, error: Exception | None) -> tuple[int, str]:
        """(exit code, paragraph) for an error that is nobody's mistake, or for None: a rank has ended. What a rank above 0 has said of a
        mistake of the user's keeps its code."""
        self.over.set()
        if error is not None and not lost_a_peer(error):
            # Code 6 from a rank above 0 means that it has lost another: it is not the one to blame.
            return (1, f"{type(error).__name__}: {error}") if self.rank else (RankError.exit_code, f"On rank 0: {type(error).__name__}: {error}")
        end, ended = time.monotonic() + min(GRACE, self.timeout), []
        while not ended and time.monotonic() < end:
            codes = [child.poll() for child in self.children]
            ended = [(rank, code) for rank, code in enumerate(codes, 1) if code not in (None, RankError.exit_code)]
            if None not in codes:
                break
            time.sleep(0.05)
        if not ended:
            return RankError.exit_code, f"Rank {self.rank} has lost the others at {self.images_seen} images: {error or 'one of them lost its peers'}"
        rank, code = ended[0]
        log = error_log(self.run_dir, rank)
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
        if self.launcher and not self.orphaned:
            os.kill(self.launcher, signal.SIGKILL)  # rank 0 should have ended this one by now: it is stuck beyond help
            while not self.orphaned:
                time.sleep(0.01)
        self.leave(code, paragraph)
