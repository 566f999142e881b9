"""Pictures whose pixels turn out broken in the middle of a run: it ends and names them, or another
of the split takes their place.
"""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reading import BARE, flattened
from torch.utils.data import DataLoader

from sdtrain.config.precheck import precheck_config
from sdtrain.data.images import Images
from sdtrain.data.skipped import Skipped
from sdtrain.errors import DataError, UserError
from sdtrain.randomness import KeyedRandom
from sdtrain.training.diffusion_module import DiffusionModule

BROKEN = ("03.png", "07.png", "11.png")


@pytest.fixture
def folder(tmp_path):
    """16 pictures with captions, three of which hold half of their pixels."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(16):
        file = folder / f"{i:02}.png"
        Image.fromarray(
            np.random.default_rng(i).integers(0, 256, (36, 40, 3), dtype=np.uint8)
        ).save(file)
        file.with_suffix(".txt").write_text(f"number {i}\n")
        if file.name in BROKEN:
            file.write_bytes(file.read_bytes()[:2000])
    return folder


def split_with(data, name):
    return next(
        (split, split.names.index(name))
        for split in map(data.split, ("train", "validation"))
        if name in split.names
    )


def test_another_of_the_split_with_its_own_caption_takes_the_place(folder):
    data = Images(path=str(folder), on_error="skip")
    assert not data.notes  # the headers are sound
    for name in BROKEN:
        split, index = split_with(data, name)
        sound = {
            caption
            for caption, file in zip(split.captions, split.names, strict=True)
            if file not in BROKEN
        }
        for ordinal in range(20):
            row = split[index, ordinal]
            assert (
                row.caption in sound
                and name in dict(row.skipped)
                and str(folder / name) in dict(row.skipped)[name]
            )
            assert torch.equal(row.image, split[split.captions.index(row.caption), ordinal].image)
        assert len({split[index, ordinal].caption for ordinal in range(100)}) == len(sound)
        fresh, _ = split_with(Images(path=str(folder), on_error="skip"), name)
        assert fresh[index, 5].caption == split[index, 5].caption
    with pytest.raises(DataError, match="03.png"):
        split, index = split_with(Images(path=str(folder)), "03.png")
        split[index, 0]


def test_a_picture_that_vanishes_is_replaced_too(folder):
    data = Images(path=str(folder), on_error="skip")
    split, index = split_with(data, "05.png")
    (folder / "05.png").unlink()
    assert "05.png" in dict(split[index, 0].skipped)


def captions(folder, workers):
    split = Images(path=str(folder), on_error="skip").split("train")
    loader = DataLoader(
        split,
        batch_size=None,
        sampler=[(i % len(split), i) for i in range(48)],
        num_workers=workers,
        collate_fn=lambda row: row.caption,
    )
    return list(loader)


def test_workers_change_no_replacement(folder):
    assert captions(folder, 2) == captions(folder, 0)


def test_with_a_generator_of_the_process_they_would(folder, monkeypatch):
    """The twin."""
    monkeypatch.setattr(
        KeyedRandom, "uniform", lambda self, ordinal, count, index=0: [random.random()] * count
    )
    random.seed(0)
    alone = captions(folder, 0)
    random.seed(0)
    assert captions(folder, 2) != alone


def test_a_picture_vanishing_while_the_headers_are_read(folder, monkeypatch):
    def gone(path, mode):
        raise FileNotFoundError(2, "No such file or directory", path)

    monkeypatch.setattr("sdtrain.data.reader.open", gone, raising=False)
    with pytest.raises(DataError, match=r"16 of 16 pictures.*No such file"):
        Images(path=str(folder))


@pytest.mark.parametrize(
    ("options", "key", "words"),
    [
        ({"on_error": "ignore"}, "data.on_error", "none of fail, skip"),
        ({"on_error": "skip", "max_skipped": -1}, "data.max_skipped", "must be at least 0"),
    ],
)
def test_bad_options(folder, options, key, words):
    with pytest.raises(UserError) as refused:
        Images(path=str(folder), **options)
    assert refused.value.key == key and words in str(refused.value)


def test_left_out_at_start_they_count_against_the_bound(folder):
    for name in ("00.png", "01.png", "02.png", "04.png"):
        (folder / name).write_bytes(b"nothing")
    data = Images(path=str(folder), on_error="skip", max_skipped=6)
    assert data.max_skipped == 2 and len(data.notes) == 1
    assert all(words in data.notes[0] for words in ("4 of 16", "00.png, 01.png, 02.png and 1 more"))
    assert not {"00.png", "04.png"} & {*data.split("train").names, *data.split("validation").names}
    with pytest.raises(
        DataError,
        match=r"4 of 16 .*data\.max_skipped=3 .*The last is 04\.png.*raise data\.max_skipped",
    ):
        Images(path=str(folder), on_error="skip", max_skipped=3)


def test_a_row_does_not_look_for_another_for_ever(folder):
    data = Images(path=str(folder), on_error="skip")
    for file in folder.glob("*.png"):
        file.unlink()
    with pytest.raises(DataError, match=r"or all of a split.*data\.max_skipped"):
        data.split("train")[0, 0]


def test_the_bound_counts_different_pictures():
    said = []
    skipped = Skipped(limit=2, warn=said.append)
    for _ in range(5):
        skipped.note([("a", "a is broken."), ("b", "b is broken.")])
    assert skipped.synchronise() == 10 and len(said) == 2
    skipped.note([("c", "c is broken.")] * 0 + [("a", "a is broken.")], count=False)
    assert skipped.synchronise() == 10 and len(said) == 2
    again = Skipped(limit=2, warn=said.append)
    again.load_state_dict(skipped.state_dict())
    assert again.synchronise() == 10
    with pytest.raises(DataError, match=r"c is broken.*data\.max_skipped"):
        again.note([("c", "c is broken.")])


@pytest.fixture
def train(train_tiny, folder, tmp_path):
    """train("key=value", ..., run="run"): a run of 64 pictures, without workers."""
    words = [
        "data=images",
        f"data.path={folder}",
        "model/autoencoder=pixels",
        "data.image_size=16",
        "data.num_workers=0",
        *BARE,
        "data.validation_fraction=0.25",
    ]

    def run_of(*more, run="run"):
        given = {word.partition("=")[0] for word in more}
        kept = [word for word in words if word.partition("=")[0] not in given]
        return train_tiny(tmp_path / run, *kept, *more)

    return run_of


def numbers(run):
    return [
        line["data/skipped"]
        for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if "data/skipped" in line
    ]


def test_a_run_ends_or_goes_on_and_counts(train, tmp_path):
    result = train(run="ends")
    assert result.code == 3
    assert any(name in result.paragraph for name in BROKEN)
    result = train("data.on_error=skip", "trainer.max_images=40")
    assert result.code == 0, result.err
    for name in BROKEN:
        assert result.err.count(f"/{name}'") == 1, name
    straight = numbers(tmp_path / "run")
    assert straight[-1] >= 6
    assert straight == sorted(straight)


@pytest.mark.slow
@pytest.mark.parametrize(("on_error", "code"), [("fail", 3), ("skip", 0)])
def test_pixels_that_a_worker_finds_broken_in_the_middle_of_a_run(
    train, folder, tmp_path, on_error, code
):
    for i in range(16, 100):  # the first 64 of training are read before the first step
        (folder / f"{i}.png").write_bytes((folder / "00.png").read_bytes())
        (folder / f"{i}.txt").write_text(f"number {i}\n")
    for name in BROKEN:
        (folder / name).write_bytes((folder / "00.png").read_bytes())
    split = Images(path=str(folder), validation_fraction=0.25).split("train")
    late = folder / split.names[-1]
    assert len(split) == 75
    late.write_bytes(late.read_bytes()[:2000])
    result = train(
        f"data.on_error={on_error}",
        "data.num_workers=1",
        "data.batch_size=4",
        "trainer.max_images=80",
        "trainer.log_every=4",
    )
    assert result.code == code, result.err
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (
        result.err.count(f"{late}'") == 1
        and "Traceback (" not in result.err
        and status["images_seen"] > 0
    )
    if code:
        assert "truncated" in result.paragraph and (status["state"], status["exit_code"]) == (
            "failed",
            3,
        )
    else:
        assert numbers(tmp_path / "run")[-1] == 1


@pytest.mark.slow
def test_a_resumed_run_goes_on_counting_and_ends_in_the_same_weights(train, saved, tmp_path):
    words = ("data.on_error=skip", "lr_schedule=constant")
    assert train(*words, "trainer.max_images=32", run="two").code == 0
    assert (
        train(*words, "resume=must", "data.max_skipped=50", run="two").code == 0
    )  # another bound makes no other run
    assert train(*words, run="one").code == 0
    one = saved(tmp_path / "one")
    two = saved(tmp_path / "two")
    assert numbers(tmp_path / "two") == numbers(tmp_path / "one") and all(
        torch.equal(one[key], two[key]) for key in one
    )


def test_a_bound_on_nothing_is_refused(composed, tmp_path):
    words = ["data=images", f"data.path={tmp_path}", "data.max_skipped=2"]
    with pytest.raises(UserError, match="no effect with data.on_error=fail") as refused:
        precheck_config(composed(*words), words)
    assert refused.value.key == "data.max_skipped"


@pytest.mark.parametrize("bounded", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_run_with_too_many_ends(train, monkeypatch, bounded):
    """And the twin: without the bound it goes on."""
    if not bounded:
        monkeypatch.setattr(
            "sdtrain.training.parts.Skipped",
            lambda limit, warn: Skipped(limit=10**6, warn=warn),
        )
    result = train("data.on_error=skip", "data.max_skipped=2")
    assert result.code == (3 if bounded else 0)
    if bounded:
        said = result.err.splitlines()[-1]
        assert (
            "may still be left out (2)" in said
            and "data.max_skipped" in said
            and any(name in said for name in BROKEN)
        )


def watch_batches(seen: str, is_keyed: bool) -> None:
    """In each rank: it writes down what it is given, as pictures and replaced ones.

    is_keyed: if not, another picture is drawn by the process's own generator.
    """
    step = DiffusionModule.training_step
    uniform = KeyedRandom.uniform

    def watched_step(self, batch, batch_index):
        rank = os.environ.get("LOCAL_RANK", "0")
        with open(Path(seen, f"rank-{rank}"), "a") as file:
            file.write(f"{len(batch.caption)} {len(batch.image)} {len(batch.skipped)}\n")
        return step(self, batch, batch_index)

    def unkeyed(self, ordinal, count, index=0):
        if self.purpose == "replacement":
            return [random.random()] * count
        return uniform(self, ordinal, count, index)

    DiffusionModule.training_step = watched_step
    if not is_keyed:
        KeyedRandom.uniform = unkeyed


@pytest.fixture
def watched(command, tiny, folder, saved, tmp_path):
    """watched(ranks, workers) -> (weights, what each rank was given, data/skipped, stderr) of a run
    over the broken pictures.
    """

    def run(ranks, workers, is_keyed=True):
        place = tmp_path / f"{ranks}-{workers}"
        place.mkdir()
        words = tiny(
            "data=images",
            f"data.path={folder}",
            "model/autoencoder=pixels",
            "data.image_size=16",
            f"data.num_workers={workers}",
            "data.on_error=skip",
            "callbacks.samples.every=0",
            "validation.num_images=4",
            "trainer.max_images=96",
        )
        words += ["strategy=ddp", f"trainer.devices={ranks}"] if ranks > 1 else []
        before = f"{__file__}:watch_batches({str(place)!r}, {is_keyed})"
        done = command("sdtrain", *words, f"hydra.run.dir={place}/run", before=before)
        assert done.code == 0, done.err
        given = []
        for rank in range(ranks):
            lines = (place / f"rank-{rank}").read_text().splitlines()
            given.append([tuple(map(int, line.split())) for line in lines])
        return flattened(saved(place / "run")), given, numbers(place / "run"), done.err

    return run


def apart(one, other):
    return ((one - other).norm() / one.norm()).item()


@pytest.mark.slow
def test_two_ranks_and_workers_equal_one(watched):
    one = watched(1, 0)
    two = watched(2, 0)
    loaded = watched(1, 2)
    for rank in two[1]:
        assert {(captions, images) for captions, images, _ in rank} == {(4, 4)} and sum(
            replaced for *_, replaced in rank
        ) > 0
    assert apart(one[0], two[0]) < 1e-5 and torch.equal(one[0], loaded[0])
    assert one[2] == two[2] == loaded[2]
    assert one[2][-1] == sum(replaced for rank in two[1] for *_, replaced in rank)
    assert all(two[3].count(f"/{name}'") == 1 for name in BROKEN)


@pytest.mark.slow
def test_with_a_generator_of_the_process_two_ranks_would_not(watched):
    """The twin."""
    assert apart(watched(1, 0, False)[0], watched(2, 0, False)[0]) > 1e-4
