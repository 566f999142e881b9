"""What happens to one of two ranks ends the run for both, and is reported once."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from reading import checkpoints, lines, newest, status
from torch import distributed as dist

from sdtrain.runs.manifest import find_damage
from sdtrain.training.ranks import lost_a_peer

# The default experiment, its length apart.
SHORT = [
    "strategy=ddp",
    "trainer.devices=2",
    "trainer.accelerator=cpu",
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


SICK = '''
"""sdtrain, where something happens to one rank in its fourth step: SICK="RANK WHAT"."""

import ctypes
import os
import signal
import sys
import time

from sdtrain.training.ranks import Ranks
from sdtrain.commands.train import main
from sdtrain.errors import DataError
from sdtrain.training.diffusion_module import DiffusionModule

rank, what = os.environ["SICK"].split()
here = os.environ.get("LOCAL_RANK", "0") == rank
step = DiffusionModule.training_step


def sick_step(self, batch, batch_index):
    if here and batch_index == 3:
        if what == "hangs":
            time.sleep(1e6)
        if what == "holds":
            # Foreign code that does not let go of the interpreter.
            ctypes.PyDLL(None).sleep(1_000_000)
        if what in ("killed", "stopped"):
            os.kill(os.getpid(), signal.SIGKILL if what == "killed" else signal.SIGSTOP)
        if what == "raises":
            raise RuntimeError("something of its own")
        if what == "nan":
            batch.noise[1, 0, 0, 0] = float("nan")
        if what == "data":
            raise DataError("The picture x.png cannot be decoded.")
        if what == "leaves":
            os._exit(0)
    return step(self, batch, batch_index)


DiffusionModule.training_step = sick_step
if here and what == "differs":
    sys.argv.append("optimizer.lr=0.5")
if here and what == "starts":
    os.killpg(0, signal.SIGTERM)
if os.environ.get("UNGUARDED"):
    Ranks._watch = lambda self: None
    Ranks.explain = lambda self, error: (1, "a bug")
if __name__ == "__main__":
    main()
'''


@pytest.fixture
def sick(tmp_path):
    """sick("1 hangs", ...) -> (process of a run that this happens to, its folder)."""
    processes = []

    def start(what, *words, **env):
        script = tmp_path / "sick.py"
        script.write_text(SICK)
        run = tmp_path / "run"
        process = subprocess.Popen(
            [sys.executable, str(script), *SHORT, *words, f"hydra.run.dir={run}"],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"SICK": what, "OMP_NUM_THREADS": "1"} | env,
            start_new_session=True,
        )
        processes.append(process)
        return process, run

    yield start
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def ended(process) -> SimpleNamespace:
    """code; err: all of stderr; printed: sdtrain's lines in it. Waits until the other rank has
    closed its end too."""
    _, err = process.communicate(timeout=120)
    printed = [line for line in err.splitlines() if line.startswith("sdtrain: ")]
    return SimpleNamespace(code=process.returncode, err=err, printed=printed)


HANG = "No optimizer step has ended for 10 s"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "code", "words"),
    [
        ("1 hangs", 6, [f"{HANG}, at 96 images", "rank 1 at", "in sick_step", "strategy.timeout"]),
        ("0 hangs", 6, ["rank 0 at", "in sick_step", "strategy.timeout"]),
        ("1 holds", 6, ["rank 0 at", "rank 1 at", "in sick_step", "strategy.timeout"]),
        ("1 stopped", 6, [HANG, "rank 1", "strategy.timeout"]),
        ("1 killed", 6, ["Rank 1 was killed by SIGKILL at 96 images"]),
        ("1 raises", 6, ["on rank 1: RuntimeError: something of its own"]),
        ("0 raises", 6, ["On rank 0: RuntimeError: something of its own"]),
        ("1 leaves", 6, ["Rank 1"]),
        ("1 data", 3, ["on rank 1: The picture x.png cannot be decoded"]),
        ("1 differs", 2, ["Rank 1", "than rank 0 (optimizer.lr: 0.002 -> 0.5)"]),
    ],
)
def test_what_happens_to_one_rank_ends_the_run_and_is_reported_once(
    sick, processes_of, what, code, words
):
    process, run = sick(what, "strategy.timeout=10")
    end = ended(process)
    assert end.code == code, end.err
    (line,) = end.printed
    assert all(word in line for word in words), line
    assert (status(run)["state"], status(run)["exit_code"]) == ("failed", code)
    assert not processes_of(run)
    assert all(find_damage(folder) is None for folder in checkpoints(run))
    stacks = {path.name: path.read_text() for path in run.glob("stuck-rank-*.txt")}
    stuck = (0, 1) if HANG in line else ()
    with_stack = (0,) if "stopped" in what else stuck
    assert stacks.keys() == {f"stuck-rank-{rank}.txt" for rank in with_stack}
    if "hangs" in what or "holds" in what:
        assert "in sick_step" in stacks[f"stuck-rank-{what[0]}.txt"]


@pytest.mark.slow
def test_a_signal_to_the_group_while_a_rank_starts_is_an_interruption(sick, processes_of):
    process, run = sick("1 starts")
    end = ended(process)
    assert end.code == 143, end.err
    assert "Rank 1" in end.err
    assert "Traceback (most" not in end.err
    assert status(run)["state"] == "interrupted" and not processes_of(run)


@pytest.mark.slow
def test_a_nan_on_one_rank_ends_both_before_the_next_checkpoint_and_its_sample_is_named(
    sick, processes_of
):
    process, run = sick("1 nan", "checkpoint.every=32", "trainer.log_every=320")
    end = ended(process)
    assert end.code == 4, end.err
    (line,) = end.printed
    # The second of the sixteen that are rank 1's in the fourth batch of 32.
    assert "first in step 4, which ended at 128 images (samples 113, t = " in line
    assert "gradient norm nan" in line
    assert newest(run).name == f"{96:012d}" and find_damage(newest(run)) is None
    assert status(run)["state"] == "diverged" and not processes_of(run)


INFINITE = '''
"""sdtrain, where one loss on rank 1 is infinite in the fourth step, and its gradient finite.

ALONE: ranks judge by their own loss.
"""

import hashlib
import os
from pathlib import Path

from lightning.pytorch.strategies import DDPStrategy

from sdtrain.commands.train import main
from sdtrain.latent_diffusion import LatentDiffusion
from sdtrain.training.diffusion_module import DiffusionModule

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


LatentDiffusion.losses = infinite
DiffusionModule.training_step = counted
if os.environ.get("ALONE"):
    DDPStrategy.reduce = lambda self, tensor, *given, **more: tensor
if __name__ == "__main__":
    try:
        main()
    finally:
        weights = b"".join(p.detach().numpy().tobytes() for p in modules[0].parameters())
        Path(os.environ["HASHES"], rank).write_text(hashlib.sha256(weights).hexdigest())
'''


@pytest.mark.slow
@pytest.mark.parametrize("alone", ["", "1"], ids=["", "judging alone"])
def test_ranks_agree_on_a_step_that_only_one_of_them_would_leave_out(tmp_path, alone):
    """And the twin, in which each judges by its own loss: their weights are not the same any
    more."""
    script = tmp_path / "infinite.py"
    script.write_text(INFINITE)
    run = tmp_path / "run"
    words = [*SHORT, "trainer.max_images=192", "trainer.max_skipped=1", f"hydra.run.dir={run}"]
    given = {"HASHES": str(tmp_path), "ALONE": alone, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), *words]
    subprocess.run(command, check=True, timeout=120, env=os.environ | given)
    assert ((tmp_path / "0").read_text() == (tmp_path / "1").read_text()) == (not alone)
    skipped = [line["train/skipped_steps"] for line in lines(run) if "train/loss" in line]
    assert skipped[-1] == (0 if alone else 1)


@pytest.mark.slow
def test_when_rank_0_is_killed_another_reports_it(sick, processes_of):
    process, run = sick("0 killed")
    end = ended(process)
    assert end.code == -signal.SIGKILL
    assert "96 images" in end.err
    assert status(run)["exit_code"] == 6 and not processes_of(run)


@pytest.mark.slow
def test_unwatched_a_hung_rank_hangs_the_run_and_a_killed_one_is_a_bug(sick):
    """The twin."""
    process, run = sick("1 killed", UNGUARDED="1")
    assert process.wait(120) not in (0, 6)
    process, run = sick("1 hangs", "strategy.timeout=2", "resume=auto", UNGUARDED="1")
    while status(run)["pid"] != process.pid:
        time.sleep(0.1)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(40)
