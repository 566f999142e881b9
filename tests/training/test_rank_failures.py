"""What happens to one of two ranks ends the run for both, and is reported once. Whole runs, one for
each way in which it is noticed; what is said of each end: test_rank_exits.py."""

import atexit
import ctypes
import hashlib
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from lightning.pytorch.strategies import DDPStrategy
from reading import SMALL, checkpoints, lines, newest, status
from torch import distributed as dist

from sdtrain.errors import DataError
from sdtrain.latent_diffusion import LatentDiffusion
from sdtrain.runs.manifest import find_damage
from sdtrain.training.diffusion_module import DiffusionModule
from sdtrain.training.ranks import Ranks, lost_a_peer

# The default experiment, of a small network, its length apart.
SHORT = [
    *SMALL,
    "strategy=ddp",
    "trainer.devices=2",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "trainer.threads=1",
    "logger=none",
    "trainer.max_images=320",
    "trainer.log_every=32",
    "checkpoint.every=64",
    "callbacks.samples.every=0",
    "validation.every=0",
    "data.num_workers=1",
    "callbacks.noise_levels.num_images=2",
    "looks.share=null",
]


def test_only_what_a_lost_peer_raises_is_taken_for_one():
    assert lost_a_peer(dist.DistBackendError("anything"))
    assert lost_a_peer(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"))
    assert not lost_a_peer(RuntimeError("something of its own"))
    assert not lost_a_peer(ValueError("Connection closed"))


def sick(at: str) -> None:
    """Something happens to one rank in its fourth step, or before its first: at="RANK WHAT"."""
    rank, what = at.split()
    if os.environ.get("LOCAL_RANK", "0") != rank:
        return
    if what == "differs":
        sys.argv.append("optimizer.lr=0.5")
    if what == "starts":
        os.killpg(0, signal.SIGTERM)
    step = DiffusionModule.training_step

    def sick_step(self, batch, batch_index):
        if batch_index == 3:
            happens(what, batch)
        return step(self, batch, batch_index)

    DiffusionModule.training_step = sick_step


def happens(what: str, batch) -> None:
    if what == "hangs":
        while not Path("enough").exists():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "holds":
        # Foreign code that does not let go of the interpreter.
        ctypes.PyDLL(None).sleep(1_000_000)
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "raises":
        raise RuntimeError("something of its own")
    if what == "nan":
        batch.noise[1, 0, 0, 0] = float("nan")
    if what == "data":
        raise DataError("The picture x.png cannot be decoded.")


def unwatched() -> None:
    Ranks._watch = lambda self: None
    Ranks.explain = lambda self, error: (1, "a bug")


@dataclass
class End:
    """err: all of stderr. printed: sdtrain's lines in it."""

    code: int
    err: str
    run: Path

    @property
    def printed(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("sdtrain: ")]


@pytest.fixture
def end_of(start, processes_of, tmp_path):
    """end_of("1 hangs", "seed=1", ...) -> how a run ends to which this happens, and that the other
    rank has ended too."""

    def ended(at: str, *words: str) -> End:
        run = tmp_path / "run"
        before = f"{__file__}:sick({at!r})"
        running = start("sdtrain", *SHORT, *words, f"hydra.run.dir={run}", before=before)
        result = running.wait()
        assert not processes_of(result)
        return End(result.code, running.said("stderr"), run)

    return ended


HANG = "No optimizer step has ended for 3 s"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "code", "words"),
    [
        ("0 hangs", 6, [HANG, "rank 0 at", "in happens", "strategy.timeout"]),
        ("1 holds", 6, [f"{HANG}, at 96 images", "rank 1 at", "in happens", "strategy.timeout"]),
        ("1 killed", 6, ["Rank 1 was killed by SIGKILL at 96 images"]),
        ("0 raises", 6, ["On rank 0: RuntimeError: something of its own"]),
        ("1 data", 3, ["on rank 1: The picture x.png cannot be decoded"]),
        ("1 differs", 2, ["Rank 1", "than rank 0 (optimizer.lr: 0.002 -> 0.5)"]),
    ],
)
def test_what_happens_to_one_rank_ends_the_run_and_is_reported_once(end_of, what, code, words):
    # Else a rank that waits to be ended would be taken for stuck.
    timeout = 3 if HANG in words[0] else 6
    end = end_of(what, f"strategy.timeout={timeout}")
    assert end.code == code, end.err
    (line,) = end.printed
    assert all(word in line for word in words), line
    assert (status(end.run)["state"], status(end.run)["exit_code"]) == ("failed", code)
    assert all(find_damage(folder) is None for folder in checkpoints(end.run))
    stacks = {path.name: path.read_text() for path in end.run.glob("stuck-rank-*.txt")}
    stuck = (0, 1) if HANG in line else ()
    assert stacks.keys() == {f"stuck-rank-{rank}.txt" for rank in stuck}
    if stuck:
        assert "in sick_step" in stacks[f"stuck-rank-{what[0]}.txt"]


@pytest.mark.slow
def test_a_signal_to_the_group_while_a_rank_starts_is_an_interruption(end_of):
    end = end_of("1 starts")
    assert end.code == 143, end.err
    assert "Rank 1" in end.err
    assert "Traceback (most" not in end.err
    assert status(end.run)["state"] == "interrupted"


@pytest.mark.slow
def test_a_nan_on_one_rank_ends_both_before_the_next_checkpoint_and_its_sample_is_named(end_of):
    end = end_of("1 nan", "checkpoint.every=32", "trainer.log_every=320")
    assert end.code == 4, end.err
    (line,) = end.printed
    # The second of the sixteen that are rank 1's in the fourth batch of 32.
    assert "first in step 4, which ended at 128 images (samples 113, t = " in line
    assert "gradient norm nan" in line
    assert newest(end.run).name == f"{96:012d}" and find_damage(newest(end.run)) is None
    assert status(end.run)["state"] == "diverged"


def infinite_on_rank_1(hashes: str, alone: bool) -> None:
    """One loss on rank 1 is infinite in the fourth step, and its gradient finite. Each rank leaves
    the hash of its weights in the folder. alone: ranks judge by their own loss."""
    rank = os.environ.get("LOCAL_RANK", "0")
    losses = LatentDiffusion.losses
    step = DiffusionModule.training_step
    steps = []
    modules = []

    def infinite(self, batch):
        found = losses(self, batch)
        if len(steps) == 4 and rank == "1":
            found.per_sample.data[1] = float("inf")
        return found

    def counted(self, batch, batch_index):
        steps.append(batch_index)
        modules[:] = [self]
        return step(self, batch, batch_index)

    def leave_hash() -> None:
        weights = b"".join(p.detach().numpy().tobytes() for p in modules[0].parameters())
        Path(hashes, rank).write_text(hashlib.sha256(weights).hexdigest())

    LatentDiffusion.losses = infinite
    DiffusionModule.training_step = counted
    if alone:
        DDPStrategy.reduce = lambda self, tensor, *given, **more: tensor
    atexit.register(leave_hash)


@pytest.mark.slow
@pytest.mark.parametrize("alone", [False, True], ids=["", "judging alone"])
def test_ranks_agree_on_a_step_that_only_one_of_them_would_leave_out(
    command, processes_of, tmp_path, alone
):
    """And the twin, in which each judges by its own loss: their weights are not the same any
    more."""
    run = tmp_path / "run"
    words = [*SHORT, "trainer.max_images=160", "trainer.max_skipped=1", f"hydra.run.dir={run}"]
    before = f"{__file__}:infinite_on_rank_1({str(tmp_path)!r}, {alone})"
    result = command("sdtrain", *words, before=before)
    assert result.code == 0 and not processes_of(result), result.err
    assert ((tmp_path / "0").read_text() == (tmp_path / "1").read_text()) == (not alone)
    skipped = [line["train/skipped_steps"] for line in lines(run) if "train/loss" in line]
    assert skipped[-1] == (0 if alone else 1)


@pytest.mark.slow
def test_when_rank_0_is_killed_another_reports_it(end_of):
    end = end_of("0 killed")
    assert end.code == -signal.SIGKILL
    assert "96 images" in end.err
    assert status(end.run)["exit_code"] == 6


@pytest.mark.slow
def test_unwatched_a_hung_rank_hangs_the_run_and_a_killed_one_is_a_bug(start, tmp_path):
    """The twin. The watch would have ended it 2 s and a grace of 1 s after the third step."""
    run = tmp_path / "run"
    words = [*SHORT, "strategy.timeout=2", f"hydra.run.dir={run}"]
    before = f"{__file__}:sick('1 hangs'), unwatched()"
    running = start("sdtrain", *words, cwd=tmp_path, before=before)
    running.until(lambda: (run / "stuck-rank-1.txt").exists())
    running.until(lambda: "in happens" in (run / "stuck-rank-1.txt").read_text())
    end = time.monotonic() + 6
    while time.monotonic() < end:
        os.kill(running.pid, 0)  # it is there
        time.sleep(0.5)
    (tmp_path / "enough").touch()
    assert running.wait().code not in (0, 6)
