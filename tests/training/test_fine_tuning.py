"""A model with pretrained weights is sampled before the first step, and at the end beside that."""

import itertools
import os
import shutil
import signal

import numpy as np
import pytest
from PIL import Image
from reading import newest, same, status, tensors
from safetensors.torch import load_file
from stable_diffusion import save_pipeline

from sdtrain.pictures import read_notes, strip_of_rows
from sdtrain.training.callbacks.budget import AT_START, TRAINING, Budget
from sdtrain.training.stopping import Stopping

SHORT = [
    "trainer.max_images=16",
    "callbacks.samples.every=1000",
    "callbacks.samples.num_images=2",
    "callbacks.samples.guidance_scales=[]",
    "optimizer.lr=1e-2",
]
START = "pictures-000000000.png"
END = "pictures-000000016.png"


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    pipeline = save_pipeline(tmp_path_factory.mktemp("pretrained") / "pipeline")
    return ["model=stable_diffusion", f"model.pretrained={pipeline}", "data.image_size=32"]


@pytest.fixture(scope="module")
def run(train_tiny, chosen, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    result = train_tiny(folder, *chosen, *SHORT)
    assert result.code == 0, result.err
    return folder


def test_the_unchanged_model_is_drawn_as_its_pipeline_draws(run, chosen, here, tmp_path):
    pipeline = chosen[1].removeprefix("model.pretrained=")
    with Image.open(run / "samples" / START) as row:
        drawn = np.asarray(row)
        requests = read_notes(row)["requests"]
    assert [request["seed"] for request in requests] == [0, 1]
    words = [f"checkpoint={pipeline}", f"prompt={requests[0]['prompt']}", "num_images=1"]
    words += ["steps=2", "guidance_scale=3", "guidance.max_std=null", f"output={tmp_path}/drawn"]
    result = here("sdtrain-sample", *words)
    assert result.code == 0, result.err
    expected = np.asarray(Image.open(tmp_path / "drawn" / "00000-seed0.png"))
    assert np.array_equal(drawn[:, :32], expected)


def test_at_the_end_both_are_beside_each_other(run):
    rows = []
    prompts = []
    for title, name in (("before training", START), ("after 16 images", END)):
        with Image.open(run / "samples" / name) as row:
            prompts = [request["prompt"] for request in read_notes(row)["requests"]]
            rows.append((title, [row.crop((x, 0, x + 32, 32)) for x in (0, 32)]))
    first, second = (np.asarray(pictures[0]) for _, pictures in rows)
    assert (first != second).any()
    sheet = np.asarray(Image.open(run / "samples" / "before_and_after-000000016.png"))
    assert np.array_equal(sheet, np.asarray(strip_of_rows(rows, prompts)))


def test_pictures_of_another_run_or_prompt_are_not_shown_beside(run, train_tiny, chosen, tmp_path):
    """A leftover of a run in the same folder is drawn anew; other prompts are told."""
    folder = tmp_path / "run"
    (folder / "samples").mkdir(parents=True)
    shutil.copy(run / "samples" / END, folder / "samples" / START)
    result = train_tiny(folder, *chosen, *SHORT, "trainer.max_images=8", "checkpoint.every=8")
    assert result.code == 0, result.err
    anew = (folder / "samples" / START).read_bytes()
    assert anew != (run / "samples" / END).read_bytes()
    more = ["callbacks.samples.prompts=[a,b]", "trainer.max_images=16", "resume=must"]
    more.append("resume_allow=[trainer.max_images]")
    result = train_tiny(folder, *chosen, *SHORT, *more)
    assert result.code == 0, result.err
    assert "not shown beside" in result.err
    assert not list((folder / "samples").glob("before_and_after-000000016*"))


def test_it_changes_no_weight(run, train_tiny, chosen, tmp_path):
    result = train_tiny(tmp_path / "run", *chosen, *SHORT, "callbacks.samples.every=0")
    assert result.code == 0, result.err
    assert not (tmp_path / "run" / "samples").exists()
    assert same(tensors(newest(tmp_path / "run")), tensors(newest(run)))


def test_it_has_a_part_of_the_budget(train_tiny, chosen, tmp_path):
    """Which is too small in a short run, and that is told."""
    assert Budget(0.1).left_at_start(1000) == pytest.approx(0.1 * TRAINING * 1000 * AT_START)
    result = train_tiny(tmp_path / "run", *chosen, *SHORT, "looks.share=0.05")
    assert result.code == 0, result.err
    assert "before the first step 0 of 2 pictures" in result.out
    assert not (tmp_path / "run" / "samples" / START).exists()


def test_a_model_without_pretrained_weights_is_not_drawn_at_the_start(train_tiny, tmp_path):
    result = train_tiny(tmp_path / "run", *SHORT)
    assert result.code == 0, result.err
    assert not list((tmp_path / "run" / "samples").glob("*-000000000.png"))
    assert not list((tmp_path / "run" / "samples").glob("before_and_after*"))


def test_a_signal_ends_it_and_the_run_stops_after_a_step(train_tiny, chosen, tmp_path, monkeypatch):
    calls = itertools.count(1)
    check = Stopping.check_interrupted

    def checked(stopping: Stopping) -> None:
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        check(stopping)

    monkeypatch.setattr(Stopping, "check_interrupted", checked)
    run = tmp_path / "run"
    result = train_tiny(run, *chosen, *SHORT)
    assert result.code == 143, result.err
    assert status(run)["state"] == "interrupted"
    assert newest(run).name == f"{8:012d}"
    assert not (run / "samples" / START).exists()


def test_loader_workers_change_no_weight(run, train_tiny, chosen, tmp_path):
    more = ["looks.share=null", "data.num_workers=2"]
    result = train_tiny(tmp_path / "run", *chosen, *SHORT, *more)
    assert result.code == 0, result.err
    assert same(tensors(newest(tmp_path / "run")), tensors(newest(run)))


@pytest.mark.slow
def test_two_ranks_train_as_one(run, command, tiny, chosen, tmp_path):
    """Up to the rounding of a mean over two ranks; the start is drawn once."""
    ranks = ["strategy=ddp", "trainer.devices=2", f"hydra.run.dir={tmp_path}/run"]
    result = command("sdtrain", *tiny(*chosen, *SHORT, *ranks))
    assert result.code == 0, result.err
    pipeline = chosen[1].removeprefix("model.pretrained=")
    before = load_file(f"{pipeline}/unet/diffusion_pytorch_model.safetensors")
    of_one = load_file(newest(run) / "model.safetensors")
    of_two = load_file(newest(tmp_path / "run") / "model.safetensors")
    difference = 0.0
    distance = 0.0
    for name, value in before.items():
        trained = of_one[f"unet.net.{name}"]
        difference += (of_two[f"unet.net.{name}"] - trained).square().sum().item()
        distance += (trained - value).square().sum().item()
    assert distance > 0
    assert difference < (1e-3) ** 2 * distance
    drawn = np.asarray(Image.open(run / "samples" / START))
    by_two = np.asarray(Image.open(tmp_path / "run" / "samples" / START))
    assert np.array_equal(by_two, drawn)
