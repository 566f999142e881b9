"""A stored listing gives what a fresh one gives, and is made again where the folder has changed."""

import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import stored_pictures
from PIL import Image
from reading import BARE

from sdtrain.assemble.model import truncated_captions_line
from sdtrain.data import dataset, folder_state, known_headers, list_images, take_inventory
from sdtrain.data.images import Images
from sdtrain.data.reader import ChangedFileError
from sdtrain.data.table_store import TableStore
from sdtrain.errors import DataError
from sdtrain.training.diffusion_module import DiffusionModule

CLASSES = ("cat", "dog", "ox")
COUNT = 12
"""Pictures that can be used, of each class."""


def paint(file: Path, seed: int, size=(40, 36)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)


def settle(folder: Path) -> None:
    """Let the folders look as if they had been left alone for long."""
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            os.utime(path, (10**9, 10**9))


@pytest.fixture
def texts(tmp_path):
    """Pictures with a .txt beside each, in a subfolder for each class, and one that is broken."""
    folder = tmp_path / "texts"
    for place, kind in enumerate(CLASSES):
        for number in range(COUNT):
            file = folder / kind / f"{number:02}.png"
            paint(file, COUNT * place + number, size=(40 + number, 36))
            file.with_suffix(".txt").write_text(f"{kind} {number}\nseen from the side, há\n")
    (folder / "cat/broken.png").write_bytes(b"no picture")
    (folder / "cat/broken.txt").write_text("broken")
    (folder / "notes.psd").write_bytes(b"")
    settle(folder)
    return folder


@pytest.fixture
def table(texts, tmp_path):
    """The same pictures with metadata.jsonl, labels and weights; one has two rows."""
    folder = tmp_path / "table"
    shutil.copytree(texts, folder, ignore=shutil.ignore_patterns("*.txt", "broken*"))
    rows = []
    for place, file in enumerate(sorted(folder.rglob("*.png"))):
        name = str(file.relative_to(folder))
        rows.append({"file_name": name, "text": [name, "x"], "label": place % 2, "weight": place})
    rows.append(rows[5] | {"text": "another"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settle(folder)
    return folder


@pytest.fixture
def reads(monkeypatch):
    """The names of the pictures whose headers are read."""
    names = []
    read = known_headers.read_header

    def read_and_note(source, name):
        names.append(name)
        return read(source, name)

    monkeypatch.setattr(known_headers, "read_header", read_and_note)
    return names


@pytest.fixture
def many(monkeypatch):
    """Any folder counts as one of many files."""
    monkeypatch.setattr(folder_state, "FEW_FILES", 0)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def load(folder, **options):
    return Images(path=str(folder), **{"on_error": "skip", **options})


def described(data) -> dict:
    """All that a data set knows before it reads a picture."""
    found = {
        "sha256": data.sha256,
        "notes": list(data.notes),
        "classes": data.classes,
        "max_skipped": data.max_skipped,
        "prompts": data.example_prompts(7),
    }
    for name in ("train", "validation"):
        split = data.split(name)
        weights = None if split.weights is None else split.weights.tolist()
        found[name] = (split.names, split.captions, split.labels, split.sizes.tolist(), weights)
    return found


def refuse(*arguments):
    raise AssertionError("The folder is listed")


OPTIONS = [
    {},
    {"image_size": 38, "upscale": True},
    {"captions": "one"},
    {"shuffle_tags": True},
    {"seed": 3},
    {"validation_fraction": 0.01},
    {"missing_captions": "empty"},
]


@pytest.mark.parametrize("few", [True, False])
def test_a_stored_listing_is_that_of_a_fresh_one(texts, table, monkeypatch, tmp_path, few):
    if not few:
        monkeypatch.setattr(folder_state, "FEW_FILES", 0)
    listed = list_images.list_images
    for folder in (texts, table):
        for options in OPTIONS:
            monkeypatch.setattr("sdtrain.data.list_images.list_images", listed)
            first = described(load(folder, **options))
            monkeypatch.setattr("sdtrain.data.list_images.list_images", refuse)
            stored = load(folder, **options)
            assert described(stored) == first
            assert stored.split("train")[1, 5].image.shape[1] == options.get("image_size", 32)
            monkeypatch.setattr("sdtrain.data.list_images.list_images", listed)
            shutil.rmtree(tmp_path / "empty", ignore_errors=True)
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
            assert described(load(folder, **options)) == first
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_only_what_has_changed_is_read_again(texts, reads):
    load(texts)
    assert len(reads) == len(CLASSES) * COUNT + 1
    for options in ({"image_size": 16}, {"seed": 1}):
        del reads[:]
        load(texts, **options)
        assert reads == ["cat/broken.png"]  # what could not be read is tried again
    paint(texts / "ox/03.png", 99)
    paint(texts / "ox/new.png", 100)
    (texts / "ox/new.txt").write_text("a new one")
    (texts / "dog/00.png").unlink()
    (texts / "cat/01.txt").write_text("another caption")
    del reads[:]
    changed = load(texts)
    assert sorted(reads) == ["cat/broken.png", "ox/03.png", "ox/new.png"]
    captions = changed.split("train").captions + changed.split("validation").captions
    names = changed.split("train").names + changed.split("validation").names
    assert {"a new one", "another caption"} <= set(captions)
    assert "dog/00.png" not in names and "ox/new.png" in names
    assert changed.sha256 != load(texts, image_size=16, seed=1, captions="one").sha256


def test_a_refused_folder_keeps_the_headers_that_were_read(texts, reads):
    with pytest.raises(DataError):
        load(texts, on_error="fail")
    (texts / "cat/broken.png").unlink()
    (texts / "cat/broken.txt").unlink()
    del reads[:]
    load(texts, on_error="fail")
    assert not reads


def test_refresh_reads_everything_again(texts, many, reads):
    load(texts)
    status = (texts / "ox/03.png").stat()
    (texts / "ox/03.png").write_bytes(b"x" * status.st_size)  # the same size and time
    os.utime(texts / "ox/03.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    before = load(texts)
    del reads[:]
    after = load(texts, refresh=True)
    assert len(reads) == len(CLASSES) * COUNT + 1
    assert after.max_skipped == before.max_skipped - 1


def index_of(data, name):
    for split in map(data.split, ("train", "validation")):
        if name in split.names:
            return split, split.names.index(name)
    raise AssertionError(name)


@pytest.mark.parametrize("few", [True, False])
def test_a_file_that_changes_later_is_noticed_when_it_is_read(texts, monkeypatch, few):
    if not few:
        monkeypatch.setattr(folder_state, "FEW_FILES", 0)
    changes = {
        "ox/03.png": lambda: paint(texts / "ox/03.png", 99, (50, 50)),
        "ox/04.png": lambda: os.utime(texts / "ox/04.png", (1, 1)),
    }
    if not few:  # else the captions were compared when the data were opened
        changes["ox/05.png"] = lambda: (texts / "ox/05.txt").write_text("another caption")
        changes["ox/06.png"] = lambda: (texts / "ox/06.txt").unlink()
    load(texts, missing_captions="empty")
    data = load(texts, missing_captions="empty")
    for name, change in changes.items():
        split, index = index_of(data, name)
        change()
        for read in (
            lambda at: at[0][at[1], 0],
            lambda at: at[0].reader.read_bytes(at[0].names[at[1]]),
        ):
            with pytest.raises(ChangedFileError) as caught:
                read((split, index))
            assert (caught.value.key, caught.value.exit_code) == ("data.refresh", 3)
    fresh = load(texts, missing_captions="empty", refresh=True)
    for name in changes:
        split, index = index_of(fresh, name)
        assert split[index, 0].skipped == ()


def test_many_files_are_not_looked_at_again(texts, many, monkeypatch):
    load(texts)
    for module in (folder_state, list_images):
        monkeypatch.setattr(module, "list_folder", refuse)
    data = load(texts)
    assert data.split("train")[0, 0].image is not None


def listings(tmp_path) -> list[Path]:
    return sorted((tmp_path / "cache/sdtrain/listings").rglob("*.arrow"))


def test_a_damaged_listing_is_made_again(texts, tmp_path):
    before = described(load(texts))
    for path in listings(tmp_path):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    assert described(load(texts)) == before
    for path in (tmp_path / "cache/sdtrain/listings").rglob("*.json"):
        path.write_text("{")
    assert described(load(texts)) == before


def test_a_cache_that_cannot_be_written_is_told(texts, tmp_path, monkeypatch):
    before = load(texts)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    data = load(texts)
    assert data.sha256 == before.sha256
    (note,) = set(data.notes) - set(before.notes)
    assert str(tmp_path / "file") in note
    assert data.split("train")[0, 0].image is not None


def list_and_count(folder, refresh, waiting, read, results) -> None:
    """What each of several processes does. waiting, read: counters that they share."""

    def wait(line) -> None:
        with waiting.get_lock():
            waiting.value += 1

    def count(source, name, original=known_headers.read_header):
        with read.get_lock():
            read.value += 1
        return original(source, name)

    take_inventory.warn = wait
    known_headers.read_header = count
    results.put(load(folder, on_error="skip", refresh=refresh).sha256)


@pytest.mark.parametrize("refresh", [False, True])
def test_one_of_several_processes_lists(texts, tmp_path, refresh):
    expected = load(texts).sha256
    if not refresh:
        shutil.rmtree(tmp_path / "cache")
    fork = multiprocessing.get_context("fork")
    waiting, read, results = fork.Value("i"), fork.Value("i"), fork.SimpleQueue()
    key = take_inventory._key(os.path.realpath(texts))
    processes = []
    with TableStore(take_inventory.listings_folder() / key).locked(lambda: None):
        for _ in range(3):
            arguments = (texts, refresh, waiting, read, results)
            processes.append(fork.Process(target=list_and_count, args=arguments))
            processes[-1].start()
        end = time.monotonic() + 60
        while waiting.value < 3:
            assert time.monotonic() < end
            time.sleep(0.005)
    assert [results.get() for _ in processes] == [expected] * 3
    for process in processes:
        process.join()
    assert read.value == len(CLASSES) * COUNT + 1


def test_truncated_captions_are_counted_once(texts):
    counted = []

    def count(captions) -> int:
        counted.append(len(captions))
        return 3

    def line(folder, key="a tokenizer"):
        conditioner = SimpleNamespace(count_truncated=count, tokens_key=key, max_tokens=8)
        return truncated_captions_line(SimpleNamespace(conditioner=conditioner), load(folder))

    first = line(texts)
    assert line(texts) == first
    assert len(counted) == 1 and f"3 of {counted[0]} " in first
    line(texts, "another tokenizer")
    line(texts, None)
    line(texts, None)
    assert len(counted) == 4
    (texts / "ox/01.txt").write_text("another caption")
    line(texts)
    assert len(counted) == 5


def test_stored_pictures_are_listed_once(tmp_path, monkeypatch):
    rows = stored_pictures.rows()
    listed = dataset.list_stored
    for name, write in stored_pictures.FORMATS.items():
        place = write(tmp_path / name, rows)

        def load_stored(place=place, **options):
            return dataset.StoredPictures(path=str(place), **{"image_size": 16} | options)

        before = described(load_stored())
        monkeypatch.setattr(dataset, "list_stored", refuse)
        stored = load_stored()
        assert described(stored) == before, name
        assert stored.split("train")[1, 5].image.shape[1] == 16
        with pytest.raises(AssertionError):
            load_stored(seed=1)
        with pytest.raises(AssertionError):
            load_stored(refresh=True)
        monkeypatch.setattr(dataset, "list_stored", listed)
        shutil.rmtree(place)
        changed = [rows[0] | {"text": "another caption"}, *rows[1:]]
        write(place, changed)
        assert load_stored().sha256 != before["sha256"], name


@pytest.mark.slow
def test_a_run_ends_when_a_picture_changes_and_continues_once_it_is_refreshed(
    texts, many, train_tiny, tmp_path, monkeypatch
):
    for number in range(100):  # the first 64 of training are read before the first step
        shutil.copy(texts / "cat/00.png", texts / f"ox/{number + COUNT}.png")
        shutil.copy(texts / "cat/00.txt", texts / f"ox/{number + COUNT}.txt")
    settle(texts)
    run = tmp_path / "run"
    words = [
        "data=images",
        f"data.path={texts}",
        "data.on_error=skip",
        "data.num_workers=0",
        "data.image_size=16",
        "data.batch_size=4",
        "model/autoencoder=pixels",
        "trainer.max_images=160",
        "resume=auto",
        *BARE,
    ]
    split = load(texts, image_size=16).split("train")
    late = texts / split.names[-1]
    step = DiffusionModule.training_step

    def touch_and_step(self, *arguments):
        os.utime(late, (1, 1))
        return step(self, *arguments)

    monkeypatch.setattr(DiffusionModule, "training_step", touch_and_step)
    result = train_tiny(run, *words)
    assert result.code == 3 and "data.refresh=true" in result.paragraph, result.err
    assert str(late) in result.paragraph
    seen = json.loads((run / "status.json").read_text())["images_seen"]
    assert 16 <= seen < 160 and list((run / "checkpoints").iterdir())
    assert train_tiny(run, *words).code == 3
    result = train_tiny(run, *words, "data.refresh=true")
    assert result.code == 0, result.err
    assert "refresh" not in (run / "config.yaml").read_text()
