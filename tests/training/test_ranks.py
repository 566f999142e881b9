"""The same run on one rank or two, in one micro-batch or several."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from reading import checkpoints, flattened, lines, newest, status, tensors

from sdtrain.data.draws import Collate
from sdtrain.data.order import Stream
from sdtrain.diffusion.noise import Gaussian
from sdtrain.runs.manifest import find_damage
from sdtrain.training.datamodule import CollateBlock
from sdtrain.types import Row

# Differences from rounding grow with each step, the faster the higher the learning rate.
SLOW_WARMUP = "lr_schedule.warmup_images=3000"
STEPS = [
    "trainer.max_images=160",
    "callbacks.samples.every=0",
    "validation.num_images=16",
    "validation.every=80",
    "checkpoint.every=80",
    SLOW_WARMUP,
]
RANKS = ["strategy=ddp", "trainer.devices=2"]


def losses(run) -> torch.Tensor:
    """Of training and validation, in the order of the lines."""
    found = []
    for line in lines(run):
        loss = line.get("train/loss", line.get("validation/loss"))
        if loss is not None:
            found.append(loss)
    return torch.tensor(found)


def assert_same_losses(run, other) -> None:
    torch.testing.assert_close(losses(run), losses(other), rtol=1e-5, atol=0)


@pytest.fixture(scope="module")
def one_rank(here, tiny, saved, tmp_path_factory):
    """(the run's folder, its weights before the first step, its weights after 20)."""
    folder = tmp_path_factory.mktemp("one")
    assert here("sdtrain", *tiny(*STEPS), f"hydra.run.dir={folder}/run").code == 0
    still = ["trainer.max_images=8", "optimizer.lr=0", "callbacks=none", "validation=none"]
    assert here("sdtrain", *tiny(*still), f"hydra.run.dir={folder}/still").code == 0
    run = folder / "run"
    return run, flattened(saved(folder / "still")), flattened(saved(run))


def distance(saved, run, one_rank) -> float:
    """Between two ends, as a share of the way."""
    _, start, end = one_rank
    return ((flattened(saved(run)) - end).norm() / (end - start).norm()).item()


def test_two_ranks_equal_one(command, tiny, saved, one_rank, tmp_path):
    run = tmp_path / """a "run", it's #1 {x} \\ é"""  # of the same name for both
    result = command("sdtrain", *tiny(*STEPS, *RANKS), f"hydra.run.dir={run}")
    assert result.code == 0, result.err
    assert 0 < distance(saved, run, one_rank) < 1e-4
    assert_same_losses(run, one_rank[0])
    ours = [path.name for path in checkpoints(run)]
    assert ours == [path.name for path in checkpoints(one_rank[0])]


def test_two_micro_batches_equal_one(here, tiny, saved, one_rank, tmp_path):
    run = tmp_path / "run"
    words = tiny(*STEPS, "trainer.accumulate=2")
    assert here("sdtrain", *words, f"hydra.run.dir={run}").code == 0
    assert 0 < distance(saved, run, one_rank) < 1e-4
    assert_same_losses(run, one_rank[0])


# The default experiment: 20 steps of 32, each in four parts.
QUARTERS = [
    "trainer.accelerator=cpu",
    "trainer.threads=1",
    "logger=none",
    "trainer.max_images=640",
    SLOW_WARMUP,
    "trainer.log_every=32",
    "checkpoint.every=160",
    "checkpoint.keep=4",
    "callbacks.samples.every=0",
    "validation.every=0",
    "data.num_workers=1",
    "callbacks.noise_levels.num_images=2",
    "looks.share=null",
]


@pytest.fixture
def quarters(command, tmp_path):
    """quarters(ranks, accumulate, script=None) -> the folder of a finished run, in a process of its
    own for each rank."""

    def trained(ranks: int, accumulate: int, script: str | None = None):
        run = tmp_path / f"{ranks} x {accumulate}{' wrong' if script else ''}"
        words = [*QUARTERS, f"trainer.accumulate={accumulate}", f"hydra.run.dir={run}"]
        if ranks > 1:
            words += ["strategy=ddp", f"trainer.devices={ranks}"]
        if not script:
            result = command("sdtrain", *words)
            assert result.code == 0, result.err
            return run
        file = tmp_path / "wrong.py"
        file.write_text(script)
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        command_line = [sys.executable, str(file), *words]
        subprocess.run(command_line, env=one_thread, check=True, capture_output=True)
        return run

    return trained


def apart(a, b) -> float:
    """How far two runs end from each other, as a share of the way that one went since its first
    checkpoint."""
    start = flattened(tensors(checkpoints(a)[0]))
    end = flattened(tensors(newest(a)))
    other = flattened(tensors(newest(b)))
    return ((other - end).norm() / (end - start).norm()).item()


@pytest.mark.slow
def test_four_parts_of_a_batch_are_the_same_step_on_one_rank_two_or_four(quarters):
    one = quarters(1, 4)
    for ranks, accumulate in ((2, 2), (4, 1)):
        other = quarters(ranks, accumulate)
        assert 0 < apart(one, other) < 1e-4
        assert_same_losses(other, one)
    whole = quarters(1, 1)  # the mean of four means is the mean over samples
    assert apart(one, whole) < 1e-4
    assert_same_losses(whole, one)
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
    block = CollateBlock(collate, rank, world)
    noise = []
    for _ in range(batches):
        batch = block([(row, ordinal) for _, ordinal in next(stream)])
        noise.append(batch.noise)
    return torch.cat(noise).double().flatten()


def test_the_noise_of_ranks_is_uncorrelated():
    ranks = torch.stack([noise_of(rank, 4) for rank in range(4)])
    between = torch.corrcoef(ranks) - torch.eye(4)
    assert between.abs().max() < 4 / ranks.shape[1] ** 0.5
    twice = torch.stack([noise_of(0, 4), noise_of(0, 4)])  # the twin
    assert torch.corrcoef(twice).min() > 0.999


@pytest.mark.parametrize("words", [["data.batch_size=9"], ["trainer.accumulate=3"]])
def test_a_batch_that_cannot_be_divided_is_refused(here, tiny, tmp_path, words):
    result = here("sdtrain", *tiny(*words, *RANKS), f"hydra.run.dir={tmp_path}/run")
    assert result.code == 2
    for key in ("data.batch_size", "trainer.devices", "trainer.accumulate"):
        assert key in result.paragraph


EQUAL_NOISE = '''
"""sdtrain, with one mistake: the noise of a rank's block does not know which rank it is for."""

from sdtrain.data import draws
from sdtrain.commands.train import main

right = draws.Collate.__init__


def wrong(self, *, global_batch, **given):
    right(self, global_batch=global_batch, **given)
    normal = self.noise.normal
    block = global_batch // 2

    def of_block(ordinal, *rest):
        return normal(ordinal // global_batch * global_batch + ordinal % block, *rest)

    self.noise.normal = of_block


draws.Collate.__init__ = wrong
if __name__ == "__main__":
    main()
'''


@pytest.mark.slow
def test_with_equal_noise_on_both_ranks_they_would_not(tiny, saved, one_rank, tmp_path):
    """The twin."""
    file = tmp_path / "wrong.py"
    file.write_text(EQUAL_NOISE)
    run = tmp_path / "run"
    words = [*tiny(*STEPS, *RANKS), f"hydra.run.dir={run}"]
    subprocess.run([sys.executable, str(file), *words], check=True)
    assert distance(saved, run, one_rank) > 1e-1


@pytest.mark.slow
@pytest.mark.parametrize("to", ["rank 0", "group"])
def test_two_ranks_stopped_by_a_signal_go_on_as_one(
    start, here, tiny, saved, one_rank, processes_of, tmp_path, to
):
    run = tmp_path / "run"
    words = ["trainer.log_every=8", "validation.every=0", f"hydra.run.dir={run}"]
    running = start("sdtrain", *tiny(*STEPS, *RANKS, *words, "data.num_workers=1"))
    metrics = run / "metrics.jsonl"
    running.until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 4)
    send = os.killpg if to == "group" else os.kill
    send(running.pid, signal.SIGTERM)
    result = running.wait()
    assert result.code == 143, result.err
    assert status(run)["state"] == "interrupted" and find_damage(newest(run)) is None
    assert not processes_of(run)
    assert here("sdtrain", *tiny(*STEPS, *words, "resume=must")).code == 0
    assert distance(saved, run, one_rank) < 1e-4


@pytest.mark.slow
def test_what_is_wrong_with_both_ranks_is_reported_once(command, tiny, processes_of, tmp_path):
    run = tmp_path / "run"
    words = tiny(*STEPS, *RANKS, "optimizer.lr=1e30", "trainer.log_every=8")
    result = command("sdtrain", *words, f"hydra.run.dir={run}")
    assert result.code == 4, result.err
    assert result.err.count("sdtrain: ") == 1 and not processes_of(run)


OWN_PARTS = """
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn


class Network(nn.Conv2d):
    def __init__(self, *, latent_channels: int) -> None:
        super().__init__(latent_channels, latent_channels, 1)
        self.spare = nn.Linear(8, 8)

    def forward(self, x, timestep, context):
        return super().forward(x)


class Thorough(DDPStrategy):
    def __init__(self, timeout=None):
        super().__init__(find_unused_parameters=True, timeout=timeout)


class Alone(SingleDeviceStrategy):
    def __init__(self):
        super().__init__(device="cpu")
"""


@pytest.mark.slow
def test_a_network_that_does_not_use_all_of_its_parameters(command, tiny, tmp_path):
    """Refused with the key that lets two ranks train it; and under strategies of the user's own."""
    (tmp_path / "own_parts.py").write_text(OWN_PARTS)
    network = ["model.unet._target_=own_parts.Network", "model/conditioner=none"]
    quiet = ["callbacks=none", "validation=none", "trainer.max_images=32"]
    words = [word for word in tiny(*network, *quiet) if not word.startswith("model.unet.b")]
    words = [word for word in words if not word.startswith(("model.unet.n", "model.unet.h"))]
    for number, (strategy, devices, code) in enumerate(
        (
            (["strategy=ddp"], 2, 2),
            (["strategy=ddp", "strategy.find_unused_parameters=true"], 2, 0),
            (["strategy=ddp", "strategy._target_=own_parts.Thorough"], 2, 0),
            (["strategy._target_=own_parts.Alone"], 1, 0),
        )
    ):
        place = f"hydra.run.dir={tmp_path}/{number}"
        given = [*words, *strategy, f"trainer.devices={devices}", place]
        result = command("sdtrain", *given, cwd=tmp_path)
        assert result.code == code, result.err
        if code:
            assert "strategy.find_unused_parameters=true" in result.paragraph
