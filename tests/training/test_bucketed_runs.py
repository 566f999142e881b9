"""Runs whose batches have several shapes: the same batches on any number of ranks, the draws in the
shape of the batch, squares wherever something is measured, and a resume bit for bit.
"""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from reading import BARE, numbers, same, tensors

from sdtrain.assemble.model import build_data
from sdtrain.assemble.training_data import TrainingData
from sdtrain.config.precheck import precheck_config
from sdtrain.data.images import Images
from sdtrain.errors import DataError, UserError
from sdtrain.runs.manifest import list_checkpoints
from sdtrain.training.estimate import first_stage_seconds, untrained_autoencoder
from sdtrain.training.first_stage import arguments_of_run, first_stage_words
from sdtrain.training.parts import calibration_latents
from sdtrain.training.probe import write_untrained

SHAPES = [(80, 40), (40, 80), (44, 44), (60, 40), (40, 66)]
BROKEN = "004.png"
"""80 pixels wide and 40 high, like each fifth."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """120 pictures of five shapes. Each shows its own number as a colour."""
    folder = tmp_path_factory.mktemp("shapes")
    for number in range(120):
        size = SHAPES[(number + 1) % 5]
        Image.new("RGB", size, (2 * number, 255 - 2 * number, 90)).save(folder / f"{number:03}.png")
        (folder / f"{number:03}.txt").write_text(f"colour {number}")
    return folder


@pytest.fixture(scope="module")
def words(folder):
    return [
        "data=images",
        f"data.path={folder}",
        "data.image_size=32",
        "data.buckets=true",
        "model.autoencoder.path=data/shapes_autoencoder",
        "model.autoencoder.sample_posterior=true",
        "data.num_workers=0",
    ]


@pytest.fixture(scope="module")
def parts(planned, built, tiny, words):
    return built(planned(*tiny(*words)))


def batches(datamodule, count, *, rank=0, world=1):
    datamodule.trainer = SimpleNamespace(world_size=world, global_rank=rank, num_devices=1)
    stream = iter(datamodule.train_dataloader())
    found = [next(stream) for _ in range(count)]
    datamodule.trainer = None
    return found


def test_each_batch_has_one_shape_and_draws_of_it(parts):
    seen = set()
    for batch in batches(parts.datamodule, 24):
        height, width = batch.image.shape[2:]
        seen.add((width, height))
        assert batch.image.shape[0] == 8
        assert batch.noise.shape == batch.posterior.shape == (8, 4, height // 4, width // 4)
        losses = parts.module.model.losses(batch)
        assert losses.per_sample.shape == (8,) and losses.per_sample.isfinite().all()
    assert seen == {(24, 48), (24, 40), (32, 32), (40, 24), (48, 24)}
    assert any("5 sizes from 24x48 to 48x24" in note for note in parts.notes)


def test_two_ranks_share_the_batches_of_one(parts):
    whole = batches(parts.datamodule, 12)
    ranks = [batches(parts.datamodule, 12, rank=rank, world=2) for rank in (0, 1)]
    for one, first, second in zip(whole, *ranks, strict=True):
        for name in ("image", "noise", "posterior", "u", "drop", "ordinal"):
            together = torch.cat([getattr(first, name), getattr(second, name)])
            assert torch.equal(together, getattr(one, name)), name
        assert first.stream_end == second.stream_end == one.stream_end


def test_what_is_measured_are_squares(parts, folder):
    for batch in parts.datamodule.validation_batches(100):
        assert batch.image.shape[2:] == (32, 32)
        assert batch.noise.shape[2:] == (8, 8)
    train = parts.datamodule.train
    expected = len(max(train.buckets.members(), key=len))
    assert len(calibration_latents(parts.module.model, parts.data)) == expected
    node = {"_target_": "sdtrain.data.images.Images", "path": str(folder), "buckets": True}
    node |= {"bucket_step": 8, "batch_size": 8}
    data = TrainingData(node, {}, [], None).data
    assert {data.split("train")[(index, 0)].image.shape for index in range(90)} == {(3, 32, 32)}
    with pytest.raises(UserError) as refused:
        _ = TrainingData(node, {"bucket_step": 4}, [], None).data
    assert refused.value.key == "data.bucket_step"


def test_a_first_stage_is_measured_on_squares(composed, folder, planned, tmp_path):
    """As trainer.probe=true and the estimate before a first stage do, with an untrained one."""
    words = ["data=images", f"data.path={folder}", "data.buckets=true", "data.batch_size=8"]
    data = build_data(composed(*words)["data"])
    assert data.split("train").buckets is not None
    stage = planned("experiment=images_autoencoder", f"data.path={folder}")
    write_untrained(untrained_autoencoder(stage), data, tmp_path / "autoencoder")
    assert (tmp_path / "autoencoder" / "config.json").is_file()
    assert first_stage_seconds(stage, untrained_autoencoder(stage), data) > 0


def test_a_first_stage_trains_on_squares_of_the_same_pictures(composed, folder):
    typed = ["data=images", f"data.path={folder}", "data.buckets=true"]
    stage = first_stage_words(composed(*typed), [])
    assert f"++data.path={folder}" in "".join(stage).replace("'", "")
    assert not any("bucket" in word for word in stage)
    with pytest.raises(UserError) as refused:
        experiment = ["experiment=images_autoencoder", f"data.path={folder}", "data.buckets=true"]
        precheck_config(composed(*experiment), experiment)
    assert refused.value.key == "data.buckets"


def test_a_first_stage_obeys_wandbs_variables_and_before_them_what_was_typed(
    planned, folder, monkeypatch
):
    """Although its own command line sets every key of the logger."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WANDB_TAGS", "é,b")
    for typed, mode in (([], "disabled"), (["logger.mode=online"], "online")):
        plan = planned("data=images", f"data.path={folder}", "logger=wandb", *typed)
        words = first_stage_words(plan.config, arguments_of_run(plan))
        assert f"++logger.mode='{mode}'" in words, mode
        assert '++logger.tags=["é", "b"]' in words


def test_a_picture_is_cropped_to_its_shape_at_the_keyed_place(folder, tmp_path):
    """The middle of an upright picture that is stored lying; a random crop is the ordinal's."""
    shutil.copytree(folder, tmp_path / "pictures")
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, :40, 0] = 255  # the left half is red
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by a quarter clockwise: red is then above
    for number in range(120):
        path = tmp_path / "pictures" / f"{number:03}.jpg"
        path.with_suffix(".png").unlink()
        Image.fromarray(pixels).save(path, exif=turned, quality=95)
    options = {"image_size": 32, "buckets": True, "bucket_step": 8}
    data = Images(path=str(tmp_path / "pictures"), **options)
    image = data.split("train")[(0, 0)].image
    assert data.split("train").buckets.sizes == ((24, 48),)
    assert image.shape == (3, 48, 24)
    assert image[0, :20].mean() > 0.9 and image[0, 28:].mean() < -0.9
    narrow = Images(path=str(tmp_path / "pictures"), crop="random", bucket_max_ratio=1.7, **options)
    rows = [narrow.split("train")[(0, ordinal)].image for ordinal in range(40)]
    assert {row.shape for row in rows} == {(3, 40, 24)}
    red = [(row[0] > 0).float().mean().item() for row in rows]
    assert min(red) < 0.45 and max(red) > 0.55
    again = narrow.split("train")[(0, 7)].image
    assert torch.equal(again, rows[7])


def test_a_picture_that_covers_its_own_shape_is_not_too_small(tmp_path):
    """24 x 48 is a bucket at 32 pixels, though its shorter side is below that of the square."""
    sizes = [(48, 24), (32, 32)] * 20
    for number, size in enumerate(sizes):
        Image.new("RGB", size, (number, 99, 200)).save(tmp_path / f"{number:02}.png")
        (tmp_path / f"{number:02}.txt").write_text("a plain colour")
    options = {"path": str(tmp_path), "image_size": 32, "bucket_step": 8}
    data = Images(buckets=True, **options)
    assert data.split("train").buckets.sizes == ((32, 32), (48, 24))
    wide = int((data.split("validation").sizes == (48, 24)).all(1).sum())
    assert any(note.startswith(f"{wide} of 10 held-out") for note in data.notes)
    row = data.split("validation")[(0, 0)]
    assert row.image.shape == (3, 32, 32)
    with pytest.raises(DataError) as refused:
        Images(**options)
    assert refused.value.key == "data.image_size"
    Image.new("RGB", (47, 24)).save(tmp_path / "00.png")
    with pytest.raises(DataError) as refused:
        Images(buckets=True, **options)
    assert refused.value.key == "data.image_size"


def test_a_broken_picture_is_replaced_by_one_of_its_shape(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "pictures")
    broken = tmp_path / "pictures" / BROKEN
    noise = np.random.default_rng(0).integers(0, 256, (40, 80, 3), np.uint8)
    Image.fromarray(noise).save(broken)
    broken.write_bytes(broken.read_bytes()[:4000])
    options = {"image_size": 32, "buckets": True, "bucket_step": 8, "on_error": "skip"}
    for seed in range(10):  # until it is not held out
        data = Images(path=str(tmp_path / "pictures"), seed=seed, **options)
        train = data.split("train")
        if BROKEN in train.names:
            break
    index = train.names.index(BROKEN)
    rows = [train[(index, ordinal)] for ordinal in range(20)]
    assert {row.image.shape for row in rows} == {(3, 24, 48)}
    assert {row.skipped[0][0] for row in rows} == {BROKEN}
    like_it = {f"colour {number}" for number in range(4, 120, 5)}
    captions = {row.caption for row in rows}
    assert len(captions) > 3 and captions <= like_it - {"colour 4"}


def test_a_run_looks_at_squares(run_of, words):
    """Samples, validation, and errors at the noise levels, whose linear denoiser knows the training
    pictures."""
    looks = ["callbacks.noise_levels.every=32", "callbacks.noise_levels.num_images=4"]
    run = run_of("run", *words, *looks, "trainer.max_images=32", "trainer.precision=32-true")
    (row,) = (run / "samples").glob("pictures-*32.png")
    with Image.open(row) as picture:
        assert picture.size == (2 * 32, 32)
    assert any("validation/bits_saved" in line for line in numbers(run))


@pytest.mark.slow
def test_a_killed_run_goes_on_in_mid_pass_bit_for_bit(start, tiny, words, tmp_path):
    """144 images are a pass and a half. The run is killed after its second checkpoint, and resumed
    with another number of workers."""
    typed = tiny(*words, *BARE, "trainer.max_images=144", "trainer.precision=32-true")
    result = start("sdtrain", *typed, f"hydra.run.dir={tmp_path}/whole").wait()
    assert result.code == 0, result.err
    run = tmp_path / "killed"
    killed = start("sdtrain", *typed, f"hydra.run.dir={run}")
    killed.until(lambda: len(list_checkpoints(run)) >= 2)
    killed.end()
    assert "finished" not in (run / "status.json").read_text()
    resumed = [*typed, f"hydra.run.dir={run}", "resume=must"]
    resumed[resumed.index("data.num_workers=0")] = "data.num_workers=2"
    result = start("sdtrain", *resumed).wait()
    assert result.code == 0, result.err
    assert "Resuming from" in result.out
    last = [tensors(list_checkpoints(each)[-1]) for each in (tmp_path / "whole", run)]
    assert same(*last)
