"""A file that is replaced after a stored data set was opened is noticed, whatever is read of it."""

import os
import shutil

import pytest
from stored_pictures import FORMATS, rows

from sdtrain.data import dataset
from sdtrain.data.reader import ChangedFileError

ROWS = rows(6)
OTHERS = [row | {"bytes": ROWS[i - 3]["bytes"], "text": f"new {i}"} for i, row in enumerate(ROWS)]
"""Under each name the picture of another row, so that all sizes in the files are possible ones."""


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "listings"))


def load(place, **options):
    return dataset.StoredPictures(path=str(place), image_size=16, **options)


def replace(place, write) -> None:
    """Put files with OTHERS in the places of those that were written there."""
    other = write(place.with_name(f"{place.name}-other"), OTHERS)
    for file in other.rglob("*"):
        os.utime(file, (10**9, 10**9))
        os.replace(file, place / file.relative_to(other))
    shutil.rmtree(other)


def refused(read) -> None:
    with pytest.raises(ChangedFileError) as caught:
        read()
    assert (caught.value.key, caught.value.exit_code) == ("data.refresh", 3)


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_is_compared_when_it_is_read(tmp_path, name):
    write = FORMATS[name]
    place = write(tmp_path / name, ROWS)
    data = load(place, on_error="skip")  # it is not skipped like a broken picture
    split = data.split("train")
    source = split.reader.source
    listed = source.stamps(split.names)
    source.check_unchanged(split.names)
    replace(place, write)
    assert source.stamps(split.names) == listed
    for index, picture in enumerate(split.names):
        for read in (
            lambda index=index: split[index, 0],
            lambda picture=picture: split.reader.read_bytes(picture),
            lambda picture=picture: source.check_unchanged([picture]),
        ):
            refused(read)
    fresh = load(place).split("train")
    assert {caption[:4] for caption in fresh.captions} == {"new "}
    others = {row["name"]: row["bytes"] for row in OTHERS}
    for picture in fresh.names:
        assert fresh.reader.read_bytes(picture) == others[picture]
    assert listed != fresh.reader.source.stamps(fresh.names)


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_that_is_replaced_while_it_is_listed(tmp_path, monkeypatch, name):
    """Either this start refuses it, or the next one lists it anew."""
    write = FORMATS[name]
    open_store = dataset.open_store
    list_stored = dataset.list_stored

    def open_and_replace(*arguments, **options):
        store = open_store(*arguments, **options)
        replace(place, write)
        return store

    def list_and_replace(*arguments):
        inventory = list_stored(*arguments)
        replace(place, write)
        return inventory

    place = write(tmp_path / "first" / name, ROWS)
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "open_store", open_and_replace)
        refused(lambda: load(place))
    assert load(place).split("train").captions[0].startswith("new")

    place = write(tmp_path / "second" / name, ROWS)
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "list_stored", list_and_replace)
        split = load(place).split("train")
    refused(lambda: split[0, 0])
    assert load(place).split("train").captions[0].startswith("new")
