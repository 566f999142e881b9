"""The same run on one rank or two, in one micro-batch or several."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from sdtrain.checkpoints import damage, published

STEPS = ["trainer.max_images=160", "callbacks.samples.every=0", "validation.num_images=16", "validation.every=80", "checkpoint.every=80"]
RANKS = ["strategy=ddp", "trainer.devices=2"]


def model(saved, run) -> torch.Tensor:
    return torch.cat([value.double().flatten() for key, value in saved(run).items() if key.startswith("model/")])


def losses(run) -> torch.Tensor:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([line.get("train/loss", line.get("validation/loss")) for line in lines])


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
    assert [path.name for path in published(tmp_path / "run")] == [path.name for path in published(one_rank[0])]


def test_two_micro_batches_equal_one(here, tiny, saved, one_rank, tmp_path):
    assert here("sdtrain", *tiny(*STEPS, "trainer.accumulate=2"), f"hydra.run.dir={tmp_path}/run").code == 0
    assert 0 < distance(saved, tmp_path / "run", one_rank) < 1e-4
    torch.testing.assert_close(losses(tmp_path / "run"), losses(one_rank[0]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("words", [["data.batch_size=9"], ["trainer.accumulate=3"]])
def test_a_batch_that_cannot_be_divided_is_refused(here, tiny, tmp_path, words):
    result = here("sdtrain", *tiny(*words, *RANKS), f"hydra.run.dir={tmp_path}/run")
    assert result.code == 2
    assert all(key in result.paragraph for key in ("data.batch_size", "trainer.devices", "trainer.accumulate"))


EQUAL_NOISE = '''
"""sdtrain, with one mistake: the noise of a rank's block does not know which rank it is for."""

from sdtrain.data import draws
from sdtrain.cli.train import main

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
    subprocess.run([sys.executable, str(tmp_path / "wrong.py"), *tiny(*STEPS, *RANKS), f"hydra.run.dir={tmp_path}/run"], check=True)
    assert distance(saved, tmp_path / "run", one_rank) > 1e-1


@pytest.mark.slow
@pytest.mark.parametrize("to", ["rank 0", "group"])
def test_two_ranks_stopped_by_a_signal_go_on_as_one(start, here, tiny, saved, one_rank, tmp_path, to):
    run = tmp_path / "run"
    words = ["trainer.log_every=8", "validation.every=0"]
    running = start("sdtrain", *tiny(*STEPS, *RANKS, *words, "data.num_workers=1"), f"hydra.run.dir={run}")
    running.until(lambda: (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= 4)
    (os.killpg if to == "group" else os.kill)(running.pid, signal.SIGTERM)
    result = running.wait()
    assert result.code == 143, result.err
    assert json.loads((run / "status.json").read_text())["state"] == "interrupted" and damage(published(run)[-1]) is None
    assert not processes_of(run)
    assert here("sdtrain", *tiny(*STEPS, *words, "resume=must"), f"hydra.run.dir={run}").code == 0
    assert distance(saved, run, one_rank) < 1e-4


@pytest.mark.slow
def test_what_is_wrong_with_both_ranks_is_said_once(command, tiny, tmp_path):
    result = command("sdtrain", *tiny(*STEPS, *RANKS, "optimizer.lr=1e30", "trainer.log_every=8"), f"hydra.run.dir={tmp_path}/run")
    assert result.code == 4, result.err
    assert result.err.count("sdtrain: ") == 1 and not processes_of(tmp_path / "run")


def processes_of(run) -> list[str]:
    """Command lines of processes that still work on this run, a moment later."""
    for _ in range(100):
        found = [line for line in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout.splitlines() if str(run) in line]
        if not found:
            return []
        time.sleep(0.1)
    return found
