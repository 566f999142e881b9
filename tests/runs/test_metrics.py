"""metrics.jsonl: whole lines or none, on a disk that refuses, and on a resume."""

import contextlib
import json
import math
import os
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
from reading import lines

from sdtrain.errors import StorageError
from sdtrain.runs.layout import RunFolder, images_seen_of
from sdtrain.runs.metrics import MetricsFile, metrics_line, read_metrics, remove_later_files
from sdtrain.training.callbacks.metrics_log import MetricsLog
from sdtrain.training.progress import Progress


def written(path: Path) -> list[int]:
    return [json.loads(line)["images_seen"] for line in path.read_text().splitlines()]


@contextlib.contextmanager
def files_at_most(size: int):
    """No file may grow beyond `size` bytes: what a full disk looks like to those who write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_number_that_is_not_finite_is_null():
    line = metrics_line(8, 1.23456, {"a": math.nan, "b": math.inf, "c": 2.0}, {"d": [1, None]})
    assert line == (
        '{"images_seen": 8, "seconds": 1.235, "a": null, "b": null, "c": 2.0, "d": [1, null]}\n'
    )


def test_lines_that_the_disk_refuses_wait_and_none_is_cut(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    assert file.append(metrics_line(8, 0.0, {}, {})) is None
    size = os.path.getsize(file.path)
    with files_at_most(size + 5):
        assert str(file.path) in file.append(metrics_line(16, 0.0, {}, {}))
        assert os.path.getsize(file.path) == size and len(file.waiting) == 1
    assert file.append(metrics_line(24, 0.0, {}, {})) is None
    assert written(file.path) == [8, 16, 24] and not file.waiting


def test_a_resumed_run_keeps_the_whole_lines_up_to_its_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = '{"images_seen": 8,  "seconds": 1}\n{"images_seen": 16, "seconds": 2}\n'
    path.write_text(whole + '[1]\n{"seconds": 1}\n{"images_seen": 24}\n{"images_se')
    file = MetricsFile(path)
    records = file.truncate_after(16)
    assert [record["images_seen"] for record in records] == [8, 16]
    assert path.read_text() == whole
    assert file.truncate_after(0) == [] and path.read_text() == ""
    assert MetricsFile(tmp_path / "missing").truncate_after(8) == []


def test_lines_are_read_as_far_as_they_are_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text('{"images_seen": 8, "seconds": 1, "a": 2}\n[1]\n{"images_seen": 16}\n{"ima')
    assert read_metrics(path) == [{"images_seen": 8, "seconds": 1.0, "a": 2}]


def test_a_file_that_cannot_be_cut_is_a_storage_error_and_stays(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(metrics_line(8, 0.0, {}, {}))
    with files_at_most(5), pytest.raises(StorageError) as caught:
        MetricsFile(path).truncate_after(8)
    assert caught.value.key == "hydra.run.dir" and caught.value.exit_code == 5
    assert written(path) == [8]


def test_what_an_earlier_process_drew_later_is_removed(tmp_path):
    kept = ["samples/grid-000000016.png", "validation/000000000016.json", "samples/forward.png"]
    later = ["samples/grid-000000024.png", "validation/000000000024.json"]
    own = ["samples/notes-24.txt"]
    for name in (*kept, *later, *own):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    remove_later_files(RunFolder(tmp_path), 16)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")}
    assert left == {*kept, *own}
    assert images_seen_of(Path("guidance_scales-000000032.png")) == 32


def test_lines_of_numbers_that_the_disk_refuses_wait_for_room_or_end_the_run(tmp_path, capsys):
    log = MetricsLog(every=1, run_dir=tmp_path)
    trainer = SimpleNamespace(is_global_zero=True, loggers=[])
    progress = Progress(batch_size=32, max_images=64, images_seen=32)
    log.file.path = Path("/dev/full")
    log.log_metrics(trainer, progress, {"train/loss": 1.0})
    assert "No space left" in capsys.readouterr().err
    with pytest.raises(StorageError, match="1 lines") as caught:
        log.on_fit_end(trainer, None)
    assert caught.value.exit_code == 5
    log.file.path = tmp_path / "metrics.jsonl"
    log.log_metrics(trainer, progress, {"train/loss": 2.0})
    assert [line["train/loss"] for line in lines(tmp_path)] == [1.0, 2.0]
    log.on_fit_end(trainer, None)
