"""The same run on one rank or two, in one micro-batch or several."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from sdtrain.data.draws import Collate
from sdtrain.data.order import Stream
from sdtrain.diffusion.noise import Gaussian
from sdtrain.runs.checkpoint import damage, published, read_weights
from sdtrain.training.datamodule import CollateBlock
from sdtrain.types import Row

STEPS = [
    "trainer.max_images=160",
    "callbacks.samples.every=0",
    "validation.num_images=16",
    "validation.every=80",
    "checkpoint.every=80",
]
RANKS = ["strategy=ddp", "trainer.devices=2"]


def model(saved, run) -> torch.Tensor:
    return torch.cat(
        [value.double().flatten() for key, value in saved(run).items() if key.startswith("model/")]
    )


def losses(run) -> torch.Tensor:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor(
        [
            loss
            for line in lines
            if (loss := line.get("train/loss", line.get("validation/loss"))) is not None
        ]
    )


@pytest.fixture(scope="module")
def one_rank(here, tiny, saved, tmp_path_factory):
    """(the run's folder, its weights before the first step, its weights after 20)."""
    folder = tmp_path_factory.mktemp("one")
    assert here("sdtrain", *tiny(*STEPS), f"hydra.run.dir={folder}/run").code == 0
    still = ["trainer.max_images=8", "optimizer.lr=0", "callbacks=none", "validation=none"]
    assert here("sdtrain", *tiny(*still), f"hydra.run.dir={folder}/still").code == 0
    return folder / "run", model(saved, folder / "still"), model(saved, folder / "run")


def distance(saved, run, one_rank) -> float:
    """Between two ends, as a share of the way."""
    _, start, end = one_rank
    return ((model(saved, run) - end).norm() / (end - start).norm()).item()


def test_two_ranks_equal_one(command, tiny, saved, one_rank, tmp_path):
    result = command("sdtrain", *tiny(*STEPS, *RANKS), f"hydra.run.dir={tmp_path}/run")
    assert result.code == 0, result.err
    assert 0 < distance(saved, tmp_path / "run", one_rank) < 1e-4
    torch.testing.assert_close(losses(tmp_path / "run"), losses(one_rank[0]), rtol=1e-5, atol=0)
    assert [path.name for path in published(tmp_path / "run")] == [
        path.name for path in published(one_rank[0])
    ]


def test_two_micro_batches_equal_one(here, tiny, saved, one_rank, tmp_path):
    assert (
        here("sdtrain", *tiny(*STEPS, "trainer.accumulate=2"), f"hydra.run.dir={tmp_path}/run").code
        == 0
    )
    assert 0 < distance(saved, tmp_path / "run", one_rank) < 1e-4
    torch.testing.assert_close(losses(tmp_path / "run"), losses(one_rank[0]), rtol=1e-5, atol=0)


# The default experiment: 20 steps of 32, each in four parts.
QUARTERS = [
    "trainer.accelerator=cpu",
    "trainer.threads=1",
    "logger=none",
    "trainer.max_images=640",
    "trainer.log_every=32",
    "checkpoint.every=160",
    "checkpoint.keep=4",
    "callbacks.samples.every=0",
    "validation.every=0",
    "data.num_workers=1",
    "callbacks.noise_levels.num_images=2",
]


@pytest.fixture
def quarters(command, tmp_path):
    """quarters(ranks, accumulate, script=None) -> the folder of a finished run, in a process of its own for each rank."""

    def trained(ranks: int, accumulate: int, script: str | None = None):
        run = tmp_path / f"{ranks} x {accumulate}{' wrong' if script else ''}"
        words = [*QUARTERS, f"trainer.accumulate={accumulate}", f"hydra.run.dir={run}"]
        words += ["strategy=ddp", f"trainer.devices={ranks}"] if ranks > 1 else []
        if script:
            (tmp_path / "wrong.py").write_text(script)
            subprocess.run(
                [sys.executable, str(tmp_path / "wrong.py"), *words],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                check=True,
                capture_output=True,
            )
        else:
            result = command("sdtrain", *words)
            assert result.code == 0, result.err
        return run

    return trained


def apart(a, b) -> float:
    """How far two runs end from each other, as a share of the way that one went since its first checkpoint."""
    folders = published(a)[0], published(a)[-1], published(b)[-1]
    start, end, other = (
        torch.cat([value.double().flatten() for value in read_weights(folder, "model").values()])
        for folder in folders
    )
    return ((other - end).norm() / (end - start).norm()).item()


@pytest.mark.slow
def test_four_parts_of_a_batch_are_the_same_step_on_one_rank_two_or_four(quarters):
    one = quarters(1, 4)
    for ranks, accumulate in ((2, 2), (4, 1)):
        other = quarters(ranks, accumulate)
        assert 0 < apart(one, other) < 1e-4
        torch.testing.assert_close(losses(other), losses(one), rtol=1e-5, atol=0)
    whole = quarters(1, 1)  # the mean of four means is the mean over samples
    assert apart(one, whole) < 1e-4
    torch.testing.assert_close(losses(whole), losses(one), rtol=1e-5, atol=0)
    assert apart(one, quarters(2, 2, EQUAL_NOISE)) > 1e-1  # the twin


def noise_of(rank: int, world: int, batches: int = 8) -> torch.Tensor:
    """What a rank's loader draws, for the default latents and a global batch of 32."""
    collate = Collate(
        seed=0,
        latent_shape=(4, 8, 8),
        posterior=False,
        stratified=True,
        global_batch=32,
        noise=Gaussian(),
    )
    stream = iter(Stream(length=1000, seed=0, start=0, size=32 // world, rank=rank, world=world))
    row = Row(image=torch.zeros(3, 1, 1), caption="")
    blocks = [
        CollateBlock(collate, rank, world)([(row, ordinal) for _, ordinal in next(stream)])
        for _ in range(batches)
    ]
    return torch.cat([block.noise for block in blocks]).double().flatten()


def test_the_noise_of_ranks_is_uncorrelated():
    ranks = torch.stack([noise_of(rank, 4) for rank in range(4)])
    between = torch.corrcoef(ranks) - torch.eye(4)
    assert between.abs().max() < 4 / ranks.shape[1] ** 0.5
    assert (
        torch.corrcoef(torch.stack([noise_of(0, 4), noise_of(0, 4)])).min() > 0.999
    )  # the twin: one rank's twice


@pytest.mark.parametrize("words", [["data.batch_size=9"], ["trainer.accumulate=3"]])
def test_a_batch_that_cannot_be_divided_is_refused(here, tiny, tmp_path, words):
    result = here("sdtrain", *tiny(*words, *RANKS), f"hydra.run.dir={tmp_path}/run")
    assert result.code == 2
    assert all(
        key in result.paragraph
        for key in ("data.batch_size", "trainer.devices", "trainer.accumulate")
    )


EQUAL_NOISE = '''
"""sdtrain, with one mistake: the noise of a rank's block does not know which rank it is for."""

from sdtrain.data import draws
from sdtrain.commands.train import main

right = draws.Collate.__init__


def wrong(self, *, global_batch, **given):
    right(self, global_batch=global_batch, **given)
    normal, block = self.noise.normal, global_batch // 2
    self.noise.normal = lambda ordinal, *rest: normal(ordinal // global_batch * global_batch + ordinal % block, *rest)


draws.Collate.__init__ = wrong
if __name__ == "__main__":
    main()
'''


@pytest.mark.slow
def test_with_equal_noise_on_both_ranks_they_would_not(tiny, saved, one_rank, tmp_path):
    """The twin."""
    (tmp_path / "wrong.py").write_text(EQUAL_NOISE)
    subprocess.run(
        [
            sys.executable,
            str(tmp_path / "wrong.py"),
            *tiny(*STEPS, *RANKS),
            f"hydra.run.dir={tmp_path}/run",
        ],
        check=True,
    )
    assert distance(saved, tmp_path / "run", one_rank) > 1e-1


@pytest.mark.slow
@pytest.mark.parametrize("to", ["rank 0", "group"])
def test_two_ranks_stopped_by_a_signal_go_on_as_one(
    start, here, tiny, saved, one_rank, tmp_path, to
):
    run = tmp_path / "run"
    words = ["trainer.log_every=8", "validation.every=0"]
    running = start(
        "sdtrain", *tiny(*STEPS, *RANKS, *words, "data.num_workers=1"), f"hydra.run.dir={run}"
    )
    running.until(
        lambda: (
            (run / "metrics.jsonl").exists()
            and len((run / "metrics.jsonl").read_text().splitlines()) >= 4
        )
    )
    (os.killpg if to == "group" else os.kill)(running.pid, signal.SIGTERM)
    result = running.wait()
    assert result.code == 143, result.err
    assert (
        json.loads((run / "status.json").read_text())["state"] == "interrupted"
        and damage(published(run)[-1]) is None
    )
    assert not processes_of(run)
    assert here("sdtrain", *tiny(*STEPS, *words, "resume=must"), f"hydra.run.dir={run}").code == 0
    assert distance(saved, run, one_rank) < 1e-4


@pytest.mark.slow
def test_what_is_wrong_with_both_ranks_is_said_once(command, tiny, tmp_path):
    result = command(
        "sdtrain",
        *tiny(*STEPS, *RANKS, "optimizer.lr=1e30", "trainer.log_every=8"),
        f"hydra.run.dir={tmp_path}/run",
    )
    assert result.code == 4, result.err
    assert result.err.count("sdtrain: ") == 1 and not processes_of(tmp_path / "run")


def processes_of(run) -> list[str]:
    """Command lines of processes that still work on this run, a moment later."""
    for _ in range(100):
        found = [
            line
            for line in subprocess.run(
                ["ps", "-eo", "args"], capture_output=True, text=True
            ).stdout.splitlines()
            if str(run) in line
        ]
        if not found:
            return []
        time.sleep(0.1)
    return found


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
            ctypes.PyDLL(None).sleep(1_000_000)  # foreign code that does not let go of the interpreter
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
    Ranks.verdict = lambda self, error: (1, "a bug")
if __name__ == "__main__":
    main()
'''
# The default experiment, its length apart.
SHORT = [
    *RANKS,
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
]


@pytest.fixture
def sick(tmp_path):
    """sick("1 hangs", ...) -> (process of a run that this happens to, its folder)."""
    processes = []

    def start(what, *words, **env):
        (tmp_path / "sick.py").write_text(SICK)
        command = [
            sys.executable,
            str(tmp_path / "sick.py"),
            *SHORT,
            *words,
            f"hydra.run.dir={tmp_path}/run",
        ]
        given = {
            "env": os.environ | {"SICK": what, "OMP_NUM_THREADS": "1"} | env,
            "start_new_session": True,
        }
        processes.append(
            subprocess.Popen(
                command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, **given
            )
        )
        return processes[-1], tmp_path / "run"

    yield start
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "code", "words"),
    [
        (
            "1 hangs",
            6,
            [
                "No optimizer step has ended for 10 s, at 96 images",
                "rank 1 at",
                "in sick_step",
                "strategy.timeout",
            ],
        ),
        ("0 hangs", 6, ["rank 0 at", "in sick_step", "strategy.timeout"]),
        ("1 holds", 6, ["rank 0 at", "rank 1 at", "in sick_step", "strategy.timeout"]),
        (
            "1 stopped",
            6,
            [
                "No optimizer step has ended for 10 s",
                "rank 1 gives no sign of life",
                "strategy.timeout",
            ],
        ),
        ("1 killed", 6, ["Rank 1 was killed by SIGKILL at 96 images"]),
        ("1 raises", 6, ["on rank 1: RuntimeError: something of its own"]),
        ("0 raises", 6, ["On rank 0: RuntimeError: something of its own"]),
        ("1 leaves", 6, ["Rank 1 left with exit code 0"]),
        ("1 data", 3, ["on rank 1: The picture x.png cannot be decoded"]),
        (
            "1 differs",
            2,
            ["Rank 1 has another configuration than rank 0 (optimizer.lr: 0.002 -> 0.5)"],
        ),
    ],
)
def test_what_happens_to_one_rank_ends_the_run_and_is_said_once(sick, what, code, words):
    running, run = sick(what, "strategy.timeout=10")
    _, said = running.communicate(timeout=120)
    assert running.returncode == code, said
    said = [line for line in said.splitlines() if line.startswith("sdtrain: ")]
    assert len(said) == 1 and all(word in said[0] for word in words), said
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", code) and not processes_of(run)
    assert all(damage(folder) is None for folder in published(run))
    stacks = {path.name: path.read_text() for path in run.glob("stuck-rank-*.txt")}
    assert stacks.keys() == {
        f"stuck-rank-{rank}.txt"
        for rank in ((0,) if "stopped" in what else (0, 1) if "No optimizer" in said[0] else ())
    }
    if "hangs" in what or "holds" in what:
        assert "in sick_step" in stacks[f"stuck-rank-{what[0]}.txt"]


@pytest.mark.slow
def test_a_signal_to_the_group_while_a_rank_starts_is_an_interruption(sick):
    running, run = sick("1 starts")
    _, said = running.communicate(timeout=120)
    assert (
        running.returncode == 143
        and "Rank 1 was ended by SIGTERM while it started" in said
        and "Traceback (most" not in said
    ), said
    assert json.loads((run / "status.json").read_text())[
        "state"
    ] == "interrupted" and not processes_of(run)


@pytest.mark.slow
def test_a_nan_on_one_rank_ends_both_before_the_next_checkpoint_and_its_sample_is_named(sick):
    running, run = sick("1 nan", "checkpoint.every=32", "trainer.log_every=320")
    _, said = running.communicate(timeout=120)
    assert running.returncode == 4, said
    said = [line for line in said.splitlines() if line.startswith("sdtrain: ")]
    # The second of the sixteen that are rank 1's in the fourth batch of 32.
    assert (
        len(said) == 1
        and "first in step 4, which ended at 128 images (samples 113, t = " in said[0]
        and "gradient norm nan" in said[0]
    ), said
    assert (
        published(run)[-1].name == f"{96:012d}"
        and damage(published(run)[-1]) is None
        and not processes_of(run)
    )
    assert json.loads((run / "status.json").read_text())["state"] == "diverged"


INFINITE = '''
"""sdtrain, where the loss of one sample on rank 1 is infinite in the fourth step, and its gradient finite. ALONE: ranks judge by their own loss."""

import hashlib
import os
from pathlib import Path

from lightning.pytorch.strategies import DDPStrategy

from sdtrain.commands.train import main
from sdtrain.training.diffusion_module import DiffusionModule

rank, losses, step = os.environ.get("LOCAL_RANK", "0"), DiffusionModule.losses, DiffusionModule.training_step
steps, modules = [], []


def infinite(self, batch):
    found = losses(self, batch)
    if len(steps) == 4 and rank == "1":
        found.per_sample.data[1] = float("inf")
    return found


def counted(self, batch, batch_index):
    steps.append(batch_index)
    modules[:] = [self]
    return step(self, batch, batch_index)


DiffusionModule.losses, DiffusionModule.training_step = infinite, counted
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
    """And the twin, in which each judges by its own loss: their weights are not the same any more."""
    (tmp_path / "infinite.py").write_text(INFINITE)
    command = [
        sys.executable,
        str(tmp_path / "infinite.py"),
        *SHORT,
        "trainer.max_images=192",
        "trainer.max_skipped=1",
        f"hydra.run.dir={tmp_path}/run",
    ]
    subprocess.run(
        command,
        check=True,
        timeout=120,
        env=os.environ | {"HASHES": str(tmp_path), "ALONE": alone, "OMP_NUM_THREADS": "1"},
    )
    assert ((tmp_path / "0").read_text() == (tmp_path / "1").read_text()) == (not alone)
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["train/skipped_steps"] for line in lines if "train/loss" in line][-1] == (
        0 if alone else 1
    )


@pytest.mark.slow
def test_when_rank_0_is_killed_another_says_so(sick):
    running, run = sick("0 killed")
    _, said = running.communicate(timeout=120)  # until the other rank has closed its end as well
    assert (
        running.returncode == -signal.SIGKILL
        and "sdtrain: Rank 1 has lost the others at 96 images" in said
    )
    assert json.loads((run / "status.json").read_text())["exit_code"] == 6 and not processes_of(run)


@pytest.mark.slow
def test_unwatched_a_hung_rank_hangs_the_run_and_a_killed_one_is_a_bug(sick, tmp_path):
    """The twin."""
    running, run = sick("1 killed", UNGUARDED="1")
    assert running.wait(120) not in (0, 6)
    running, run = sick("1 hangs", "strategy.timeout=2", "resume=auto", UNGUARDED="1")
    while json.loads((run / "status.json").read_text())["pid"] != running.pid:
        time.sleep(0.1)
    with pytest.raises(subprocess.TimeoutExpired):
        running.wait(40)
