"""Several processes fill one cache, and one that is killed loses little."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from sdtrain.precompute import store as store_module

COUNT = 300
"""Pictures: five batches."""


@pytest.fixture
def many(pictures, paint) -> Path:
    for number in range(12, COUNT):
        paint(pictures / f"{number:03}.png", number)
        (pictures / f"{number:03}.txt").write_text(f"caption {number}")
    return pictures


class InProcess:
    """A function that runs in a process of its own, forked from this one."""

    def __init__(self, function, *arguments) -> None:
        context = multiprocessing.get_context("fork")
        self.results = context.SimpleQueue()
        self.process = context.Process(
            target=lambda: self.results.put(function(*arguments)), daemon=False
        )
        self.process.start()

    def result(self):
        value = self.results.get()
        self.process.join()
        return value


@pytest.mark.slow
def test_two_processes_at_once_share_the_work(images_of, many, cached, counting):
    """Each picture is encoded once, by one of them; both end with all, of which 64 are held out."""
    both_have_begun = multiprocessing.get_context("fork").Barrier(2)

    def make() -> tuple[int, int]:
        moments = counting.moments

        def waits_at_first(images):
            if images.any() and not counting.seen:
                both_have_begun.wait(60)
            return moments(images)

        counting.moments = waits_at_first
        split = cached(images_of(many, flip=False), counting).data.split("train")
        rows = [split[index, index] for index in range(len(split))]
        return len(counting.seen), sum(row.moments is not None for row in rows)

    processes = [InProcess(make) for _ in range(2)]
    results = [process.result() for process in processes]
    encoded = [count for count, _ in results]
    assert sum(encoded) == COUNT and min(encoded) > 0
    assert {rows for _, rows in results} == {COUNT - 64}


@pytest.mark.slow
def test_a_process_that_is_killed_three_times_goes_on(
    images_of, many, cached, counting, monkeypatch, tmp_path
):
    """With a shard after each batch: no more than the last batch is encoded again."""
    monkeypatch.setattr(store_module, "SHARD_SECONDS", -1.0)
    write = store_module.write_shard

    def make(kill_at: int) -> None:
        """Dies while it writes shard `kill_at`, whose temporary file stays behind."""
        written = 0

        def dying(folder, keys, values, pictures, *, identity):
            nonlocal written
            written += 1
            if written == kill_at:
                (folder / ".half.1.tmp").write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            return write(folder, keys, values, pictures, identity=identity)

        store_module.write_shard = dying
        cached(images_of(many, flip=False), counting)

    folder = tmp_path / "cache" / "latents"
    for kill_at, shards in ((2, 1), (1, 1), (3, 3)):
        process = InProcess(make, kill_at)
        process.process.join()
        assert process.process.exitcode == -signal.SIGKILL
        assert len(list(folder.glob("*.safetensors"))) == shards
    split = cached(images_of(many, flip=False), counting).data.split("train")
    assert len(counting.seen) == COUNT - 3 * 64
    assert all(split[index, index].moments is not None for index in range(len(split)))


@pytest.mark.slow
def test_the_work_of_a_process_that_dies_is_taken_over(
    images_of, many, cached, counting, monkeypatch
):
    """While another one waits for it."""
    context = multiprocessing.get_context("fork")
    has_claimed = context.Event()
    waits = context.Event()

    def dies() -> None:
        def moments(images):
            if images.any():
                has_claimed.set()
                waits.wait(60)
                os.kill(os.getpid(), signal.SIGKILL)
            return counting.autoencoder.moments(images)

        counting.moments = moments
        cached(images_of(many, flip=False), counting)

    def waiting() -> None:
        waits.set()

    process = InProcess(dies)
    assert has_claimed.wait(60)
    cached(images_of(many, flip=False), counting, check_signals=waiting)
    process.process.join()
    assert len(counting.seen) == COUNT
