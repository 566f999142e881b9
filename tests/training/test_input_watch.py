"""A loader that gives nothing ends the run, with what is known of it."""

import multiprocessing
import signal
import tempfile
import threading
from multiprocessing import util

import pytest
from mishaps import BATCH
from reading import checkpoints, status

from sdtrain.data.draws import Collate
from sdtrain.data.shapes import Shapes
from sdtrain.diffusion.noise import Gaussian
from sdtrain.errors import UserError
from sdtrain.signals import Signals
from sdtrain.training import input_watch
from sdtrain.training.datamodule import DataModule
from sdtrain.training.input_watch import MAX_SOCKET_PATH, InputWatch, use_short_socket_folder
from sdtrain.training.progress import Progress


def left_with(timeout: float, signals: Signals | None) -> tuple[int, str]:
    """What a run leaves with whose loader gives a batch, and then none."""
    left = []
    released = threading.Event()

    def leave(code: int, paragraph: str) -> None:
        left.append((code, paragraph))
        released.set()

    def load():
        yield "a batch"
        assert released.wait(60)

    progress = Progress(8, max_images=80)
    watch = InputWatch(timeout=timeout, signals=signals, progress=progress, end_process=leave)
    assert list(watch.watched(load)) == ["a batch"]
    watch.finish()
    return left[0]


def test_a_batch_that_does_not_come_ends_the_run():
    code, paragraph = left_with(0.2, None)
    assert code == 3
    for known in ("0.2 s", "0 images", "threading.py", "data.timeout"):
        assert known in paragraph


def test_a_signal_is_followed_while_a_batch_does_not_come(monkeypatch):
    monkeypatch.setattr(input_watch, "GRACE", 0.1)
    signals = Signals()
    signals.received = signal.SIGTERM
    assert left_with(60, signals)[0] == 143


@pytest.fixture
def long_name(tmp_path, monkeypatch):
    """TMPDIR is a folder with a path too long for a socket."""
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.delitem(multiprocessing.current_process()._config, "tempdir", raising=False)
    yield folder
    multiprocessing.current_process()._config.pop("tempdir", None)


def test_workers_meet_in_a_folder_of_a_short_name(long_name):
    collate = Collate(
        seed=0,
        latent_shape=(4, 2, 2),
        posterior=False,
        stratified=False,
        global_batch=8,
        noise=Gaussian(),
    )
    data = DataModule(
        data=Shapes(size=64, validation_size=16),
        num_workers=1,
        seed=0,
        collate=collate,
        progress=Progress(8, max_images=80),
    )
    loader = data.train_dataloader()
    assert len(util.get_temp_dir() + "/listener-xxxxxxxx") <= MAX_SOCKET_PATH
    assert tempfile.gettempdir() == str(long_name)
    assert len(next(iter(loader)).caption) == 8


def test_where_there_is_no_short_name_the_variable_is_named(long_name, monkeypatch):
    monkeypatch.setattr(input_watch, "SHORT_FOLDERS", ("/nowhere",))
    with pytest.raises(UserError) as refused:
        use_short_socket_folder()
    assert refused.value.key == "data.num_workers"
    assert "TMPDIR" in str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_cannot_be_read_to_its_end_ends_the_run(
    train, processes_of, tmp_path, workers
):
    run = tmp_path / "run"
    words = ("data.timeout=3", f"data.num_workers={workers}")
    result = train(run, *words, before=f"picture_that_hangs({4 * BATCH})")
    assert result.code == 3, result.err
    assert "data.timeout" in result.err
    assert status(run)["state"] == "failed"
    assert checkpoints(run)
    assert not processes_of(result)


@pytest.mark.slow
def test_a_signal_ends_a_run_whose_pictures_cannot_be_read(train, processes_of, tmp_path):
    run = tmp_path / "run"
    result = train(run, before=f"picture_that_hangs({4 * BATCH}, SIGTERM)")
    assert result.code == 143, result.err
    assert status(run)["state"] == "interrupted"
    assert not processes_of(result)
