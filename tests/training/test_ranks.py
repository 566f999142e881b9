"""The same run on one rank or two, in one micro-batch or several."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch
from reading import BARE, checkpoints, flattened, lines, newest, status

from sdtrain.data.draws import Collate
from sdtrain.data.order import Stream
from sdtrain.diffusion.noise import Gaussian
from sdtrain.runs.manifest import find_damage
from sdtrain.training.datamodule import CollateBlock
from sdtrain.training.diffusion_module import DiffusionModule
from sdtrain.types import Row

# Differences from rounding grow with each step, the faster the higher the learning rate.
SLOW_WARMUP = "lr_schedule.warmup_images=3000"
STEPS = [  # six
    "trainer.max_images=48",
    "trainer.log_every=8",
    "callbacks.samples.every=0",
    "validation.num_images=16",
    "validation.every=24",
    "checkpoint.every=24",
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
def one_rank(train_tiny, saved, tmp_path_factory):
    """(the run's folder, its weights before the first step, its weights at the end)."""
    folder = tmp_path_factory.mktemp("one")
    run = folder / "run"
    assert train_tiny(run, *STEPS).code == 0
    still = [*BARE, "trainer.max_images=8", "optimizer.lr=0"]
    assert train_tiny(folder / "still", *still).code == 0
    return run, flattened(saved(folder / "still")), flattened(saved(run))


def distance(saved, run, one_rank) -> float:
    """Between two ends, as a share of the way."""
    _, start, end = one_rank
    return ((flattened(saved(run)) - end).norm() / (end - start).norm()).item()


def gradient(module, batch) -> torch.Tensor:
    """Of the loss of one micro-batch."""
    module.zero_grad()
    module.training_step(batch, 0).backward()
    parameters = module.model.unet.parameters()
    return torch.cat([value.grad.double().flatten() for value in parameters])


def test_the_mean_over_two_ranks_is_the_gradient_of_one(planned, built, tiny_config):
    """Of the batches that each rank's loader makes. With processes: the slow tests."""
    parts = built(planned(config=tiny_config(*BARE)))
    batches = []
    for world, rank in ((1, 0), (2, 0), (2, 1)):
        parts.datamodule.trainer = SimpleNamespace(world_size=world, global_rank=rank)
        batches.append(next(iter(parts.datamodule.train_dataloader())))
    whole, first, second = (batch.ordinal.tolist() for batch in batches)
    assert sorted(first + second) == whole == list(range(8))
    one, of_first, of_second = (gradient(parts.module, batch) for batch in batches)
    assert ((of_first + of_second) / 2 - one).norm() < 1e-5 * one.norm()
    assert (of_first - one).norm() > 0.01 * one.norm()  # the twin: a rank alone has another


@pytest.mark.slow
def test_two_micro_batches_equal_one(run_of, saved, one_rank):
    run = run_of("parts", *STEPS, "trainer.accumulate=2")
    assert 0 < distance(saved, run, one_rank) < 1e-4
    assert_same_losses(run, one_rank[0])


@pytest.mark.slow
def test_four_parts_of_a_batch_are_the_same_step_on_one_rank_two_or_four(
    command, tiny, run_of, saved, one_rank, tmp_path
):
    """The mean of four means is the mean over samples. In a folder whose name is the same for every
    rank, whatever signs it holds."""
    one = run_of("1 x 4", *STEPS, "trainer.accumulate=4")
    others = {"1 x 4": one}
    of_one = [path.name for path in checkpoints(one_rank[0])]
    for ranks, accumulate in ((2, 2), (4, 1)):
        other = tmp_path / f"""a "run", it's #1 {{x}} \\ é {ranks} x {accumulate}"""
        parts = ["strategy=ddp", f"trainer.devices={ranks}", f"trainer.accumulate={accumulate}"]
        result = command("sdtrain", *tiny(*STEPS, *parts), f"hydra.run.dir={other}")
        assert result.code == 0, result.err
        others[other.name] = other
    for name, other in others.items():
        assert 0 < distance(saved, other, one_rank) < 1e-4, name
        assert_same_losses(other, one_rank[0])
        assert [path.name for path in checkpoints(other)] == of_one


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


@pytest.mark.parametrize("word", ["data.batch_size=9", "trainer.accumulate=3"])
def test_a_batch_that_cannot_be_divided_is_refused(refused, tiny_config, word):
    error = refused(config=tiny_config("strategy=ddp", "trainer.devices=2", word))
    assert error.exit_code == 2
    for key in ("data.batch_size", "trainer.devices", "trainer.accumulate"):
        assert key in str(error)


def equal_noise() -> None:
    """One mistake: the noise of a rank's block does not know which rank it is for."""
    right = Collate.__init__

    def wrong(self, *, global_batch, **given):
        right(self, global_batch=global_batch, **given)
        normal = self.noise.normal
        block = global_batch // 2

        def of_block(ordinal, *rest):
            return normal(ordinal // global_batch * global_batch + ordinal % block, *rest)

        self.noise.normal = of_block

    Collate.__init__ = wrong


@pytest.mark.slow
def test_with_equal_noise_on_both_ranks_they_would_not(command, tiny, saved, one_rank, tmp_path):
    """The twin."""
    run = tmp_path / "run"
    words = [*tiny(*STEPS, *RANKS), f"hydra.run.dir={run}"]
    result = command("sdtrain", *words, before=f"{__file__}:equal_noise()")
    assert result.code == 0, result.err
    assert distance(saved, run, one_rank) > 1e-1


def signal_to_the_group() -> None:
    """Rank 0 sends it in its third step."""
    step = DiffusionModule.training_step

    def signalled(self, batch, batch_index):
        if batch_index == 2 and self.global_rank == 0:
            os.killpg(0, signal.SIGTERM)
        return step(self, batch, batch_index)

    DiffusionModule.training_step = signalled


@pytest.mark.slow
def test_two_ranks_stopped_by_a_signal_go_on_as_one(
    command, here, tiny, saved, one_rank, processes_of, tmp_path
):
    """To both at once, as of Ctrl-C. To one alone: test_failures.py."""
    run = tmp_path / "run"
    words = ["validation.every=0", f"hydra.run.dir={run}"]
    waiting = tiny(*STEPS, *RANKS, *words, "data.num_workers=1")
    result = command("sdtrain", *waiting, before=f"{__file__}:signal_to_the_group()")
    assert result.code == 143, result.err
    assert status(run)["state"] == "interrupted" and find_damage(newest(run)) is None
    assert not processes_of(result)
    assert here("sdtrain", *tiny(*STEPS, *words, "resume=must")).code == 0
    assert distance(saved, run, one_rank) < 1e-4


@pytest.mark.slow
def test_what_is_wrong_with_both_ranks_is_reported_once(command, tiny, processes_of, tmp_path):
    run = tmp_path / "run"
    words = tiny(*STEPS, *RANKS, "optimizer.lr=1e30")
    result = command("sdtrain", *words, f"hydra.run.dir={run}")
    assert result.code == 4, result.err
    assert result.err.count("sdtrain: ") == 1 and not processes_of(result)


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
    quiet = [*BARE, "trainer.max_images=16"]
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
