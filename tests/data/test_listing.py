"""What is read of a folder; all the rest is counted: nothing is left out without a line."""

import os
import re

import pytest
from PIL import Image

from sdtrain.data.decode import EXCLUDED_FORMATS, FORMATS, picture_suffixes
from sdtrain.data.images import Images
from sdtrain.data.split import hold_out
from sdtrain.errors import DataError

PLAIN = Image.new("RGB", (48, 48), (200, 10, 10))

MODES = {"MSP": "1", "XBM": "1", "BLP": "P"}
"""Of the formats that cannot write RGB."""


def paint(file, format="PNG", **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    PLAIN.convert(MODES.get(format, "RGB")).save(file, format, **options)
    file.with_suffix(".txt").write_text("a red square")


def folder_of(path, count=4):
    for i in range(count):
        paint(path / f"{i}.png")
    return path


def names(data):
    return sorted(data.split("train").names + data.split("validation").names)


def load(path, **options):
    return Images(path=str(path), **options)


def test_every_suffix_that_pillow_reads_and_can_write_is_read(tmp_path):
    folder_of(tmp_path)
    written = set()
    for suffix, format in picture_suffixes().items():
        if format in Image.SAVE:
            name = f"x{suffix[1:]}"
            paint(tmp_path / f"{name}{suffix}", format)
            paint(tmp_path / f"{name}_{suffix.upper()}", format)
            written.add(format)
    data = load(tmp_path)
    for split in map(data.split, ("train", "validation")):
        for index in range(len(split)):
            assert split[index, 0].image.shape == (3, 32, 32)
    assert len(names(data)) == len(list(tmp_path.iterdir())) - len(list(tmp_path.glob("*.txt")))
    assert not any("left out" in note for note in data.notes)
    assert {"TGA", "PCX", "QOI", "ICO", *FORMATS} <= written
    assert not EXCLUDED_FORMATS & set(picture_suffixes().values())
    assert {".jfif", ".apng", ".jpe", ".dib", ".pbm", ".j2k", ".mpo"} <= set(picture_suffixes())


def test_a_format_without_a_mark_is_taken_under_its_own_suffix_only(tmp_path):
    folder_of(tmp_path)
    paint(tmp_path / "x.tga", "TGA")
    assert "x.tga" in names(load(tmp_path))
    (tmp_path / "x.tga").rename(tmp_path / "x.png")  # a broken PNG would be noise of some size
    with pytest.raises(DataError, match=r"x\.png"):
        load(tmp_path)


def test_all_that_is_left_out_is_counted_in_one_line(tmp_path):
    folder_of(tmp_path)
    assert load(tmp_path).notes == []
    for name in ("a.psd", "b.PSD", "c.svg", "README.txt", "none", ".DS_Store", "sub/d.webm"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / ".thumbs").mkdir()
    (tmp_path / "again").symlink_to(tmp_path / "sub")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (line,) = load(tmp_path).notes
    for counted in (
        "2 .psd",
        "1 .svg",
        "1 .webm",
        "1 .txt that belong",
        "1 without a suffix",
        "2 hidden",
        "1 links that lead nowhere",
        "1 links to folders",
    ):
        assert counted in line
    count = sum(map(int, re.findall(r"(?:read:|,) (\d+) ", line)))
    assert count == 10
    lonely = tmp_path / "lonely"
    lonely.mkdir()
    (lonely / "a.psd").touch()
    with pytest.raises(DataError, match=r"1 \.psd"):
        load(lonely)


def test_a_metadata_file_leaves_texts_out_and_may_name_what_has_no_suffix(tmp_path):
    folder_of(tmp_path)
    (tmp_path / "0.png").rename(tmp_path / "zero")
    (tmp_path / "1.png").rename(tmp_path / ".one.png")
    files = ["zero", ".one.png", "2.png", "3.png"]
    rows = "".join(f"{name},a\n" for name in files)
    (tmp_path / "metadata.csv").write_text(f"file_name,text\n{rows}")
    data = load(tmp_path)
    assert names(data) == sorted(files)
    (line,) = data.notes
    assert "4 .txt" in line


def test_links_to_folders_are_followed_each_folder_once(tmp_path):
    here = folder_of(tmp_path / "here")
    there = folder_of(tmp_path / "there", count=3)
    folder_of(there / "deep", count=2)
    before = names(load(here))
    held_out = set(load(here).split("validation").names)
    (here / "b").symlink_to(there)
    (here / "a").symlink_to(there / "deep")
    (there / "back").symlink_to(here)
    (there / "deep" / "up").symlink_to(tmp_path)  # what lies beside the data is not brought in
    (here / "itself").symlink_to(here)
    (tmp_path / "beside.png").write_bytes(b"broken")
    data = load(here)
    linked = ["a/0.png", "a/1.png", "b/0.png", "b/1.png", "b/2.png"]
    assert names(data) == sorted(before + linked)
    (line,) = data.notes
    assert "4 links to folders" in line  # back, up, itself, and deep in b, which a has read
    assert hold_out(before, 0.05, 0) == held_out
    split = data.split("train")
    assert split[len(split) - 1, 0].caption == "a red square"
    # In metadata too: a row may name what lies in a linked folder, and nothing else outside.
    for name, sound in (("b/2.png", True), ("../beside.png", False), ("b/../beside.png", False)):
        rows = "".join(f"{each},x\n" for each in [*names(data), name])
        (here / "metadata.csv").write_text(f"file_name,text\n{rows}")
        if sound:
            assert len(names(load(here))) == 10
        else:
            with pytest.raises(DataError, match="line"):
                load(here)


@pytest.mark.parametrize("name", ["0.txt", "sub/5.txt", "metadata.jsonl", "metadata.csv"])
def test_captions_may_not_be_a_link_out_of_the_data(tmp_path, name):
    here = folder_of(tmp_path / "here")
    paint(here / "sub" / "5.png")
    secret = tmp_path / "secret"
    secret.write_text("the passwords")
    (here / name).unlink(missing_ok=True)
    (here / name).symlink_to(os.path.relpath(secret, (here / name).parent))
    with pytest.raises(DataError) as caught:
        load(here)
    assert "passwords" not in str(caught.value) and name in str(caught.value)
    assert caught.value.key == "data.path"
    if name.endswith(".txt"):
        (here / name).unlink()
        (here / name).symlink_to(here / "1.txt")  # one inside is no harm
        assert len(names(load(here))) == 5


def test_frames_shared_and_empty_captions_are_told(tmp_path):
    folder_of(tmp_path)
    more = [PLAIN.point(lambda value: value // 2), PLAIN]
    paint(tmp_path / "moving.gif", "GIF", save_all=True, append_images=more)
    paint(tmp_path / "pages.tif", "TIFF", save_all=True, append_images=more)
    paint(tmp_path / "1.jpg", "JPEG")
    (tmp_path / "2.txt").write_text("")
    frames, empty, shared = load(tmp_path, missing_captions="empty").notes
    assert "several frames" in frames and "moving.gif, pages.tif" in frames
    assert "1 of 7" in empty and "2.png" in empty
    assert "1.txt" in shared


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path, monkeypatch):
    folder_of(tmp_path / "here")
    (tmp_path / "locked" / "in").mkdir(parents=True)
    (tmp_path / "here" / "link").symlink_to(tmp_path / "locked")
    scan = os.scandir

    def denied(path):
        if os.path.realpath(path) == str(tmp_path / "locked" / "in"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", denied)  # root may list everything
    with pytest.raises(DataError, match="cannot be listed"):
        load(tmp_path / "here")
