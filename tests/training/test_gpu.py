"""Training on a CUDA device, and the setting that makes it repeat itself."""

import math
import subprocess
import sys

import pytest
import torch
from reading import lines, newest, same, tensors

from sdtrain.config.schema import TrainerSettings
from sdtrain.training.checkpoint_io import FolderIO
from sdtrain.training.child import SCRIPT
from sdtrain.training.trainer import make_trainer

GPU = ["trainer.accelerator=gpu", "callbacks=none", "validation=none", "lr_schedule=constant"]
EXTRAS = {"adamw_8bit": "bitsandbytes", "schedule_free": "schedulefree"}
SETTINGS = {
    "max_images": 8,
    "accelerator": "cpu",
    "devices": 1,
    "precision": "32-true",
    "accumulate": 1,
    "gradient_clip": 1.0,
    "max_skipped": None,
    "log_every": 8,
    "threads": None,
    "max_minutes": None,
}


def test_deterministic_reaches_torch(tmp_path):
    try:
        for deterministic in (True, False):
            make_trainer(
                TrainerSettings(**SETTINGS, deterministic=deterministic),
                strategy="auto",
                batch_size=8,
                logger=None,
                callbacks=[],
                run_dir=tmp_path,
                checkpoint_io=FolderIO(config="", keep=2, max_failed_saves=0, warn=print),
            )
            assert torch.are_deterministic_algorithms_enabled() == deterministic
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_deterministic_gpu_resumes_exactly(here, tiny, tmp_path, precision):
    words = tiny(*GPU, f"trainer.precision={precision}", "trainer.deterministic=true")

    def train(name: str, *more: str):
        result = here("sdtrain", *words, f"hydra.run.dir={tmp_path / name}", *more)
        assert result.code == 0, result.err
        return tensors(newest(tmp_path / name))

    try:
        whole = train("whole")
        train("parts", "trainer.max_images=32")
        assert same(whole, train("parts", "resume=must"))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["adafactor", "adamw_8bit", "muon", "schedule_free"])
def test_every_optimizer_resumes_exactly_on_a_gpu(here, tiny, tmp_path, name):
    if name in EXTRAS:
        pytest.importorskip(EXTRAS[name])
    words = tiny(*GPU, f"optimizer={name}", "trainer.deterministic=true", "checkpoint.every=40")

    def train(folder: str, *more: str):
        result = here("sdtrain", *words, f"hydra.run.dir={tmp_path / folder}", *more)
        assert result.code == 0, result.err
        return tensors(newest(tmp_path / folder))

    try:
        whole = train("whole", "trainer.max_images=80")
        train("parts", "trainer.max_images=40")
        assert same(whole, train("parts", "trainer.max_images=80", "resume=must"))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "words",
    [
        ["trainer.precision=32-true"],
        ["trainer.precision=bf16-mixed"],
        ["trainer.precision=16-mixed", "optimizer.fused=false", "trainer.max_skipped=100"],
        ["trainer.precision=bf16-mixed", "strategy=ddp"],
    ],
)
def test_a_gpu_learns_in_every_precision(tiny, tmp_path, words):
    """In a process that starts anew: bitsandbytes, which diffusers imports where it is installed,
    has touched the GPU in the one from which `start` forks, and CUDA does not survive a fork.
    """
    run = tmp_path / "run"
    more = ["trainer.max_images=1600", "trainer.log_every=160", "checkpoint.every=1600"]
    command = [sys.executable, str(SCRIPT), *tiny(*GPU, *words, *more), f"hydra.run.dir={run}"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    losses = [line["train/loss"] for line in lines(run) if "train/loss" in line]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]
