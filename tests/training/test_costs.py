"""What the guards cost: their parts against a step of the default experiment, in one process and with one thread."""

import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import nn

from sdtrain.data.draws import Collate
from sdtrain.runs.checkpoint import not_finite, snapshot
from sdtrain.training.datamodule import CollateBlock
from sdtrain.training.run import Run

ROUNDS = 6


def seconds(work) -> float:
    """Of this process on the processor: what others do meanwhile does not count."""
    began = time.process_time()
    work()
    return time.process_time() - began


@pytest.fixture(scope="module")
def default(composed, tmp_path_factory):
    """The default run, built, with the first batches of its stream and an optimizer that has moments."""
    threads = torch.get_num_threads()
    words = ["trainer.accelerator=cpu", "trainer.threads=1", "logger=none"]
    run = Run(composed(*words), words, tmp_path_factory.mktemp("costs"), Console(quiet=True))
    run.build()
    torch.set_num_threads(1)
    run.module.trainer = SimpleNamespace(
        datamodule=run.datamodule, strategy=SimpleNamespace(reduce=lambda value, **_: value)
    )
    yield run
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 100], ids=["", "a hundredfold"])
def test_the_guards_cost_less_than_2_percent_of_a_step(default, times):
    """And the twin, in which each is done a hundred times: measured so, they do not."""
    module, data, size = default.module, default.datamodule, default.datamodule.batch_size
    optimizer = module.configure_optimizers()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    collate = CollateBlock(data.collate, 0, 1)

    def step():
        optimizer.zero_grad()
        module.window_loss = 0.0
        module.training_step(collate([(data.train[(i, i)], i) for i in range(size)]), 0).backward()
        module.optimisation.clip(optimizer, module.window_loss)
        optimizer.step()

    step()
    saved = {
        "model": module.state_dict(),
        "ema": module.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    steps_between_saves = default.cfg["checkpoint"]["every"] / size
    norm = torch.ones(())

    def finite():
        bad = (~(norm + norm).isfinite()).float()
        torch.where(bad.bool(), torch.full_like(norm, float("nan")), norm)

    parts = {
        "clipping and its norm": (
            partial(nn.utils.clip_grad_norm_, parameters, 1e9, foreach=True),
            1,
        ),
        "is it finite": (finite, 1),
        "keyed draws": (partial(draws, data.collate, size), 1),
        "snapshot": (partial(snapshot, saved), steps_between_saves),
        "is what is saved finite": (
            lambda: [not_finite(saved[name]) for name in ("model", "ema")],
            steps_between_saves,
        ),
    }
    spent = dict.fromkeys(["step", *parts], 0.0)
    for _ in range(ROUNDS):
        spent["step"] += seconds(step) / ROUNDS
        for name, (work, every) in parts.items():
            spent[name] += times * seconds(work) / every / ROUNDS
    shares = {name: value / spent["step"] for name, value in spent.items() if name != "step"}
    parted = ", ".join(f"{name} {share:.2%}" for name, share in shares.items())
    print(f"\na step {1000 * spent['step']:.0f} ms; {parted}; all {sum(shares.values()):.2%}")
    assert (sum(shares.values()) < 0.02) == (times == 1)


def draws(collate: Collate, size: int) -> None:
    """Every random number of a batch."""
    for ordinal in range(size):
        collate.noise.normal(ordinal, collate.latent_shape)
        collate.u(ordinal, collate.scalars.uniform(ordinal, 2)[0])
        if collate.posterior is not None:
            collate.posterior.normal(ordinal, collate.latent_shape)
