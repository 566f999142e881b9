"""What goes wrong in the default experiment, of which only the budget is shortened: numbers that are not finite, signals, full disks."""

import json
import math
import shutil

import pytest
import torch
from torch import nn

from sdtrain.callbacks import checkpoint as saving
from sdtrain.callbacks.metrics_log import MetricsLog
from sdtrain.checkpoints import damage, published, read_trainer, read_weights, write_checkpoint
from sdtrain.module import DiffusionModule
from sdtrain.optimisation import Optimisation

pytestmark = pytest.mark.slow

BATCH = 32
SHORT = [
    "trainer.accelerator=cpu", "trainer.threads=1", "logger=none", "data.num_workers=1", "callbacks.samples.every=0", "validation.every=0",
    f"trainer.max_images={6 * BATCH}", f"trainer.log_every={6 * BATCH}", f"checkpoint.every={BATCH}",
]


def tensors(folder) -> dict:
    """Weights, average and moments of one checkpoint."""
    found = {f"{name}/{key}": value for name in ("model", "ema") for key, value in read_weights(folder, name).items()}
    state = read_trainer(folder)["optimizer_states"][0]["state"]
    return found | {f"optimizer/{number}/{key}": value for number, moments in state.items() for key, value in moments.items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def finite(folder) -> bool:
    return all(value.isfinite().all() for value in tensors(folder).values())


def status(run) -> dict:
    return json.loads((run / "status.json").read_text())


@pytest.fixture(scope="module")
def whole(here, tmp_path_factory):
    """The run to which nothing happens, with all its checkpoints."""
    run = tmp_path_factory.mktemp("whole") / "run"
    result = here("sdtrain", *SHORT, "checkpoint.keep=6", f"hydra.run.dir={run}")
    assert result.code == 0, result.err
    return run


def weight(module, batch) -> None:
    with torch.no_grad():
        next(module.unet.parameters()).view(-1)[0] = math.nan


def latent(module, batch) -> None:
    autoencoder = module.autoencoder
    encode = autoencoder.encode

    def once(image, posterior):
        latents = encode(image, posterior).clone()
        latents[3, 0, 0, 0] = math.nan
        autoencoder.encode = encode
        return latents

    autoencoder.encode = once


@pytest.fixture
def in_step_5(monkeypatch):
    """Something happens to the module or the batch at the start of the fifth step."""
    def patch(what):
        step = DiffusionModule.training_step

        def sick(self, batch, batch_index):
            if batch.stream_end == 5 * BATCH:
                what(self, batch)
            return step(self, batch, batch_index)

        monkeypatch.setattr(DiffusionModule, "training_step", sick)
    return patch


@pytest.mark.parametrize(("what", "samples"), [(weight, "128, 129, 130, 131, 132, 133, 134, 135, t = "), (latent, "131, t = ")], ids=["weight", "latent"])
def test_a_nan_ends_the_run_and_the_newest_checkpoint_is_the_state_before(here, whole, in_step_5, tmp_path, what, samples):
    in_step_5(what)
    run = tmp_path / "run"
    result = here("sdtrain", *SHORT, f"hydra.run.dir={run}")
    assert result.code == 4, result.err
    for said in ("1 of the last 5 optimizer steps, first in step 5, which ended at 160 images", f"(samples {samples}", "; loss nan, gradient norm nan)",
                 "the last checkpoint is good", "optimizer.lr (now 0.002)", "trainer.max_skipped"):
        assert said in result.paragraph, result.paragraph
    assert status(run)["state"] == "diverged" and status(run)["exit_code"] == 4
    newest = published(run)[-1]
    assert newest.name == f"{4 * BATCH:012d}" and damage(newest) is None
    assert same(tensors(newest), tensors(whole / "checkpoints" / newest.name))


def test_a_run_that_has_diverged_goes_on_as_if_it_had_not(here, whole, in_step_5, tmp_path, monkeypatch):
    """With what was wrong put right: to the same end, bit for bit."""
    run = tmp_path / "run"
    in_step_5(latent)
    assert here("sdtrain", *SHORT, f"hydra.run.dir={run}").code == 4
    monkeypatch.undo()
    result = here("sdtrain", *SHORT, "resume=must", f"hydra.run.dir={run}")
    assert result.code == 0, result.err
    assert same(tensors(published(run)[-1]), tensors(published(whole)[-1]))


def test_unasked_before_a_save_a_divergence_is_saved_over(here, whole, in_step_5, tmp_path, monkeypatch):
    """The twin: the newest checkpoint lacks a step, and the state before it is gone."""
    monkeypatch.setattr(MetricsLog, "on_save_checkpoint", lambda *given: None)
    in_step_5(latent)
    run = tmp_path / "run"
    assert here("sdtrain", *SHORT, f"hydra.run.dir={run}").code == 4
    newest = published(run)[-1]
    assert int(newest.name) > 4 * BATCH and not same(tensors(newest), tensors(whole / "checkpoints" / newest.name))


def test_unguarded_a_nan_reaches_every_weight_and_the_disk(here, in_step_5, tmp_path, monkeypatch):
    """The twin of the other two guards: the step that is masked, and the look at what is saved."""
    def unguarded(self, optimizer, loss):
        norm = nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], self.gradient_clip)
        self.judged = torch.zeros(()), torch.zeros(())
        return norm

    monkeypatch.setattr(Optimisation, "clip", unguarded)
    in_step_5(latent)
    run = tmp_path / "run"
    result = here("sdtrain", *SHORT, f"hydra.run.dir={run}")
    assert result.code == 4 and "is not finite at 000000000160 images: it is not saved" in result.paragraph, result.err
    assert finite(published(run)[-1])
    monkeypatch.setattr(saving, "not_finite", lambda tensors: None)
    result = here("sdtrain", *SHORT, f"hydra.run.dir={tmp_path}/worse")
    assert result.code == 0 and not finite(published(tmp_path / "worse")[-1])


def test_a_learning_rate_of_1e9_ends_the_run_and_leaves_good_checkpoints(here, tmp_path):
    words = [word for word in SHORT if not word.startswith(("trainer.max_images", "trainer.log_every"))]
    run = tmp_path / "run"
    result = here("sdtrain", *words, "trainer.max_images=640", "trainer.log_every=640", "optimizer.lr=1e9", f"hydra.run.dir={run}")
    assert result.code == 4, result.err
    for said in ("optimizer steps, first in step ", "images (samples ", ", t = ", "; loss ", ", gradient norm ", "optimizer.lr (now 1e+09)"):
        assert said in result.paragraph
    assert published(run) and finite(published(run)[-1]) and damage(published(run)[-1]) is None


@pytest.fixture
def poisoned(whole, tmp_path):
    """A run with two checkpoints, in the newer of which one weight is NaN: whole, by its manifest."""
    run = tmp_path / "run"
    for folder in published(whole)[2:4]:
        shutil.copytree(folder, run / "checkpoints" / folder.name)
    folder = published(run)[-1]
    model = read_weights(folder, "model")
    next(iter(model.values())).view(-1)[0] = math.nan
    write_checkpoint(folder, model, read_weights(folder, "ema"), read_trainer(folder), (folder / "config.yaml").read_text())
    assert damage(folder) is None
    return run


def test_a_nan_in_a_checkpoint_is_not_gone_on_with(here, whole, poisoned):
    result = here("sdtrain", *SHORT, "resume=must", f"hydra.run.dir={poisoned}")
    assert result.code == 4 and str(published(poisoned)[-1]) in result.paragraph and "is not finite" in result.paragraph, result.err
    shutil.rmtree(published(poisoned)[-1])  # as it says
    result = here("sdtrain", *SHORT, "resume=must", f"hydra.run.dir={poisoned}")
    assert result.code == 0 and same(tensors(published(poisoned)[-1]), tensors(published(whole)[-1]))


def test_unlooked_at_a_nan_in_a_checkpoint_is_called_good(here, poisoned, monkeypatch):
    """The twin: the samples are blamed, and the checkpoint is not."""
    monkeypatch.setattr(saving, "not_finite", lambda tensors: None)
    result = here("sdtrain", *SHORT, "resume=must", f"hydra.run.dir={poisoned}")
    assert result.code == 4 and "first in step 5" in result.paragraph and "the last checkpoint is good" in result.paragraph
    assert not finite(published(poisoned)[-1])
