"""A disk without room: training goes on, the older checkpoints stay, and the run ends with 5 if it
must."""

import subprocess

import pytest
from mishaps import BATCH
from reading import checkpoints, lines, newest, same, status, tensors

from sdtrain.runs.manifest import find_damage

pytestmark = pytest.mark.slow


@pytest.fixture
def disk(whole, tmp_path):
    """A file system of its own with room for four checkpoints."""
    place = tmp_path / "disk"
    place.mkdir()
    files = [path for path in newest(whole).iterdir() if path.is_file()]
    room = 4 * sum(path.stat().st_size for path in files) + 500_000
    mount = ["mount", "-t", "tmpfs", "-o", f"size={room}", "none", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems can be mounted by root alone")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def same_as(whole, checkpoint) -> bool:
    """Whether a checkpoint is, bit for bit, the one of `whole` at as many images."""
    return same(tensors(checkpoint), tensors(whole / "checkpoints" / checkpoint.name))


def lines_of_training(run) -> list[int]:
    """Images seen of each."""
    return [line["images_seen"] for line in lines(run) if "train/loss" in line]


@pytest.mark.parametrize(("allowed", "reached"), [(3, 6), (1, 5)])
def test_on_a_full_disk_training_goes_on_the_older_checkpoints_stay_and_it_ends_with_5(
    train, whole, disk, allowed, reached
):
    """To the end, where the last save must hold, or until too many in a row have failed."""
    run = disk / "run"
    words = ["trainer.log_every=32", f"checkpoint.max_failed_saves={allowed}"]
    result = train(run, *words, before=f"full_from_step_3({str(disk)!r})")
    assert result.code == 5, result.err
    assert "Traceback" not in result.err
    assert f"{reached * BATCH} of {6 * BATCH} images" in result.out
    printed = [line for line in result.err.splitlines() if line.startswith("sdtrain: ")]
    assert "hydra.run.dir" in printed[-1] and "MiB are free" in printed[-1]
    assert "failed saves in a row: 1" in result.err
    assert [int(folder.name) for folder in checkpoints(run)] == [BATCH, 2 * BATCH]
    for folder in checkpoints(run):
        assert find_damage(folder) is None and same_as(whole, folder)
    seen = lines_of_training(run)
    # As far as the last block goes, and no half a line.
    assert seen == [32 * (place + 1) for place in range(len(seen))] and len(seen) >= 2
    assert not list(run.rglob(".*.tmp"))


def test_when_a_full_disk_has_room_again_nothing_is_missing_but_a_picture(train, whole, disk):
    run = disk / "run"
    words = [
        "trainer.log_every=32",
        "callbacks.samples.every=96",
        "callbacks.samples.num_images=2",
        "steps=2",
    ]
    result = train(run, *words, before=f"full_from_step_3({str(disk)!r}, until=5)")
    assert result.code == 0, result.err
    assert "Training continues without this picture" in result.err
    assert lines_of_training(run) == [32, 64, 96, 128, 160, 192]
    assert status(run)["state"] == "finished"
    assert {path.name for path in (run / "samples").iterdir()} == {
        "forward.png",
        "grid-000000192.png",
        "strip-000000192.png",
        "pictures-000000192.png",
        "guidance-000000192.png",
    }
    assert newest(run).name == newest(whole).name
    assert find_damage(newest(run)) is None and same_as(whole, newest(run))


def test_room_made_by_removing_the_older_ones_first_would_leave_none(train, disk):
    """The twin of the older ones that stay."""
    full = f"full_from_step_3({str(disk)!r}), rash_when_full({str(disk)!r})"
    result = train(disk / "run", before=full)
    assert result.code == 5 and not checkpoints(disk / "run"), result.err
