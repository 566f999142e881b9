"""Shards come back as they were written, and one that was changed or cut is never read."""

import pickle

import numpy as np
import pytest
import torch

from sdtrain.data.shards import (
    MISSING,
    DamagedError,
    Shard,
    ShardFolder,
    identity_hash,
    key_of,
    write_shard,
)
from sdtrain.errors import StorageError
from sdtrain.training.outcome import user_error_of_worker

COUNT = 5
IDENTITY = identity_hash({"autoencoder": "one"})


def written(folder, dtype=np.float32, start=0):
    """A shard of COUNT arrays, with their keys and digests: (path, keys, values, digests)."""
    numbers = range(start, start + COUNT)
    keys = [key_of(number=number) for number in numbers]
    digests = [bytes([number]) * 32 for number in numbers]
    values = np.random.default_rng(start).standard_normal((COUNT, 2, 4, 3, 2)).astype(dtype)
    return write_shard(folder, keys, values, digests, identity=IDENTITY), keys, values, digests


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_arrays_come_back_by_their_keys(tmp_path, dtype):
    _, keys, values, digests = written(tmp_path, dtype)
    _, more_keys, more_values, _ = written(tmp_path, dtype, start=COUNT)
    folder = ShardFolder(tmp_path, IDENTITY)
    wanted = [more_keys[2], keys[4], key_of(number=99), None]
    places = folder.places(wanted)
    assert places[2:].tolist() == [[MISSING, MISSING]] * 2
    for (number, row), expected in zip(places, (more_values[2], values[4]), strict=False):
        found = folder.shards[number].read(row)
        assert found.dtype == np.float32
        assert np.array_equal(found, expected.astype(np.float32))
    number, row = places[1]
    assert folder.shards[number].pictures[row].tobytes() == digests[4]
    assert keys[0] in folder and key_of(number=99) not in folder


def test_a_shard_that_another_process_adds_is_found(tmp_path):
    _, keys, _, _ = written(tmp_path)
    folder = ShardFolder(tmp_path, IDENTITY)
    _, more_keys, _, _ = written(tmp_path, start=COUNT)
    assert more_keys[0] not in folder
    folder.refresh()
    assert keys[0] in folder and more_keys[0] in folder


def parts_of(path) -> dict[str, int]:
    """{part: offset of a byte in it} of a shard."""
    size = path.stat().st_size
    header = int.from_bytes(path.read_bytes()[:8], "little")
    return {"header": 12, "first": 8 + header + 3, "last": size - 3, "middle": size - 200}


@pytest.mark.parametrize("part", ["header", "first", "middle", "last"])
def test_a_flipped_byte_is_noticed(tmp_path, part):
    """Before a value of the shard is read for the first time."""
    path, _, _, _ = written(tmp_path)
    content = bytearray(path.read_bytes())
    content[parts_of(path)[part]] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedError) as caught:
        Shard(path).read(0)
    assert (caught.value.exit_code, caught.value.key) == (5, "data.cache")


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_shard_that_is_cut_short_is_left_out(tmp_path, length):
    path, keys, _, _ = written(tmp_path)
    path.write_bytes(path.read_bytes()[:length])
    folder = ShardFolder(tmp_path, IDENTITY)
    assert keys[0] not in folder
    assert [error.path for error in folder.damaged] == [path]


def test_values_are_verified_once_and_in_each_process(tmp_path, monkeypatch):
    path, _, _, _ = written(tmp_path)
    shard = Shard(path)
    checks = []
    check = Shard.check
    monkeypatch.setattr(Shard, "check", lambda self: (checks.append(1), check(self)))
    shard.read(0)
    shard.read(1)
    assert len(checks) == 1
    elsewhere = pickle.loads(pickle.dumps(shard))  # as a worker gets it that is started afresh
    elsewhere.read(0)
    assert len(checks) == 2
    path.unlink()
    assert shard.read(2).shape == (2, 4, 3, 2)  # still mapped
    with pytest.raises(DamagedError):
        pickle.loads(pickle.dumps(shard)).read(0)


def test_of_two_arrays_with_one_key_the_same_counts_in_every_order(tmp_path):
    """Whichever shard a process saw first: that with the smallest file name."""
    shared = key_of(number=0)
    paths = {}
    for number in (1, 2, 3):
        keys = [key_of(number=number), shared]
        values = np.full((2, 3), number, np.float32)
        path = write_shard(tmp_path, keys, values, [bytes(32)] * 2, identity=IDENTITY)
        paths[path] = number
    expected = paths[min(paths)]
    for first in paths:
        hidden = [path.rename(path.with_name(f".{path.name}")) for path in paths if path != first]
        folder = ShardFolder(tmp_path, IDENTITY)
        for path in hidden:
            path.rename(path.with_name(path.name[1:]))
        folder.refresh()
        ((number, row),) = folder.places([shared])
        assert folder.shards[number].read(row).tolist() == [expected] * 3


def test_a_shard_of_another_identity_is_refused(tmp_path):
    """At the start, and when another process adds it."""
    other = identity_hash({"autoencoder": "another"})
    folder = ShardFolder(tmp_path, other)
    written(tmp_path)
    for opened in (folder.refresh, lambda: ShardFolder(tmp_path, other)):
        with pytest.raises(StorageError) as caught:
            opened()
        assert (caught.value.exit_code, caught.value.key) == (5, "data.cache")
    assert len(list(tmp_path.iterdir())) == 1


def test_damage_that_a_worker_finds_names_the_key(tmp_path):
    path, _, _, _ = written(tmp_path)
    shard = Shard(path)
    content = bytearray(path.read_bytes())
    content[parts_of(path)["first"]] ^= 1
    path.write_bytes(content)

    class Rows(torch.utils.data.Dataset):
        def __getitem__(self, index):
            return shard.read(index)

        def __len__(self):
            return COUNT

    loader = torch.utils.data.DataLoader(Rows(), num_workers=1, multiprocessing_context="fork")
    with pytest.raises(StorageError) as caught, user_error_of_worker():
        next(iter(loader))
    assert (caught.value.exit_code, caught.value.key) == (5, "data.cache")
    assert str(path) in str(caught.value) and "Traceback" not in str(caught.value)
