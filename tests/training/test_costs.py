"""What the guards cost against a step of the default experiment, in one process and with one
thread."""

import math
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sdtrain.assemble.model import build_data
from sdtrain.config.precheck import precheck_config
from sdtrain.data.draws import Collate
from sdtrain.runs.checkpoint import find_non_finite, snapshot
from sdtrain.training.datamodule import CollateBlock
from sdtrain.training.parts import Parts, build_parts
from sdtrain.training.plan import make_plan
from sdtrain.training.progress import Progress

ROUNDS = 6


def seconds(work) -> float:
    """Of this process on the processor: what others do meanwhile does not count."""
    began = time.process_time()
    work()
    return time.process_time() - began


@pytest.fixture(scope="module")
def default(composed, tmp_path_factory):
    """The parts of the default run, in one process with one thread."""
    words = ["trainer.accelerator=cpu", "trainer.threads=1", "logger=none"]
    plan = make_plan(precheck_config(composed(*words), words))
    progress = Progress(plan.config["data"]["batch_size"], plan.prechecked.trainer.max_images)
    data = build_data(plan.config["data"])
    parts = build_parts(plan, data, tmp_path_factory.mktemp("costs"), progress)
    one_rank = SimpleNamespace(reduce=lambda value, **_: value)
    parts.module.trainer = SimpleNamespace(strategy=one_rank)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield parts, plan.prechecked.checkpoint.every
    torch.set_num_threads(threads)


class Step:
    """A step of training: the batch is drawn and collated, the loss is charged, the weights
    move."""

    def __init__(self, parts: Parts) -> None:
        self.module = parts.module
        self.data = parts.datamodule
        self.size = parts.module.progress.batch_size
        self.optimizer = parts.module.configure_optimizers()
        self.collate = CollateBlock(self.data.collate, 0, 1)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        batch = self.collate([(self.data.train[(i, i)], i) for i in range(self.size)])
        self.module.training_step(batch, 0).backward()
        self.module.configure_gradient_clipping(self.optimizer)
        self.optimizer.step()


def look_for_nan(norm: torch.Tensor) -> None:
    """What a step does so that a gradient that is not finite moves nothing."""
    bad = (~(norm + norm).isfinite()).float()
    torch.where(bad.bool(), torch.full_like(norm, math.nan), norm)


def draws(collate: Collate, size: int) -> None:
    """Every random number of a batch."""
    for ordinal in range(size):
        collate.noise.normal(ordinal, collate.latent_shape)
        collate.u(ordinal, collate.scalars.uniform(ordinal, 2)[0])
        if collate.posterior is not None:
            collate.posterior.normal(ordinal, collate.latent_shape)


def look_at_what_is_saved(saved: dict) -> None:
    for name in ("model", "ema"):
        find_non_finite(saved[name])


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 100], ids=["", "a hundredfold"])
def test_the_guards_cost_less_than_2_percent_of_a_step(default, times):
    """And the twin, in which each is done a hundred times: measured so, they do not."""
    parts, images_between_saves = default
    step = Step(parts)
    step()
    weights = parts.module.state_dict()
    saved = {"model": weights, "ema": weights, "optimizer": step.optimizer.state_dict()}
    steps_between_saves = images_between_saves / step.size
    parameters = list(parts.module.trained().values())
    clip = partial(nn.utils.clip_grad_norm_, parameters, 1e9, foreach=True)
    guards = {  # name -> (work, steps from one time to the next)
        "clipping and its norm": (clip, 1),
        "is it finite": (partial(look_for_nan, torch.ones(())), 1),
        "keyed draws": (partial(draws, parts.datamodule.collate, step.size), 1),
        "snapshot": (partial(snapshot, saved), steps_between_saves),
        "is what is saved finite": (partial(look_at_what_is_saved, saved), steps_between_saves),
    }
    spent = dict.fromkeys(["step", *guards], 0.0)
    for _ in range(ROUNDS):
        spent["step"] += seconds(step) / ROUNDS
        for name, (work, every) in guards.items():
            spent[name] += times * seconds(work) / every / ROUNDS
    shares = {name: spent[name] / spent["step"] for name in guards}
    parted = ", ".join(f"{name} {share:.2%}" for name, share in shares.items())
    print(f"\na step {1000 * spent['step']:.0f} ms; {parted}; all {sum(shares.values()):.2%}")
    assert (sum(shares.values()) < 0.02) == (times == 1)
