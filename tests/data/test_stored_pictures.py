"""Pictures in Parquet, Arrow and tar files: the same rows as in a folder, and clear errors."""

import gzip
import json
import pickle
import tarfile
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import stored_pictures
import torch
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from stored_pictures import FORMATS, add, image_table, write_folder, write_parquet, write_tar

from sdtrain.data.columns import Columns
from sdtrain.data.dataset import StoredPictures
from sdtrain.data.images import Images
from sdtrain.errors import DataError, UserError

ROWS = stored_pictures.rows()
SPLITS = ("train", "validation")


def load(path, **options):
    return StoredPictures(path=str(path), **{"image_size": 16} | options)


def refused(path, key, **options):
    with pytest.raises(UserError) as caught:
        load(path, **options)
    assert caught.value.key == key
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """{format: where the pictures of ROWS are}, with `folder`."""
    folder = tmp_path_factory.mktemp("stored")
    places = {name: write(folder / name, ROWS) for name, write in FORMATS.items()}
    return places | {"folder": write_folder(folder / "folder", ROWS)}


@pytest.fixture(scope="module")
def with_depth(tmp_path_factory):
    """{format: where the pictures of ROWS are with their depth maps}."""
    folder = tmp_path_factory.mktemp("with_depth")
    made = stored_pictures.with_depth(ROWS)
    return {name: write(folder / name, made) for name, write in FORMATS.items()}


def test_all_formats_give_the_same_rows(stored):
    options = {"image_size": 16, "flip": True, "crop": "random", "captions": "one"}
    folder = Images(path=str(stored["folder"]), **options)
    for name in FORMATS:
        data = StoredPictures(path=str(stored[name]), **options)
        assert (data.sha256, data.classes) == (folder.sha256, folder.classes), name
        assert data.example_prompts(5) == folder.example_prompts(5)
        for found, expected in zip(map(data.split, SPLITS), map(folder.split, SPLITS), strict=True):
            assert (found.names, found.captions) == (expected.names, expected.captions)
            assert (found.sizes == expected.sizes).all()
            assert (found.weights == expected.weights).all()
            for index in range(len(expected)):
                row = expected[index, index + 7]
                again = found[index, index + 7]
                assert torch.equal(again.image, row.image), (name, index)
                assert (again.caption, again.label) == (row.caption, row.label)
                picture = expected.names[index]
                assert found.reader.read_bytes(picture) == expected.reader.read_bytes(picture)


def test_loader_workers_read_the_same(stored):
    for name in FORMATS:
        split = load(stored[name]).split("train")
        copy = pickle.loads(pickle.dumps(split))
        items = [(index, index) for index in range(len(split))]
        loader = torch.utils.data.DataLoader(split, batch_size=None, sampler=items, num_workers=2)
        for index, row in enumerate(loader):
            assert torch.equal(row.image, copy[index, index].image), name


def with_name(row, name):
    return row | {"name": name}


def test_pictures_without_a_name_of_their_own(tmp_path):
    """They are called by file and row, or by file and member."""
    same = [with_name(row, "image.png") for row in ROWS]
    write_parquet(tmp_path / "parquet", same)
    names = load(tmp_path / "parquet").split("train").names
    assert names == sorted(names) and all("-of-00002.parquet:0000" in name for name in names)
    for file in range(2):
        folder = tmp_path / "tar" / str(file)
        numbered = [with_name(row, f"{i:03}.png") for i, row in enumerate(ROWS[file * 12 :][:12])]
        write_tar(folder, numbered, files=1)
    names = set()
    for split in map(load(tmp_path / "tar").split, SPLITS):
        names.update(split.names)
        for index, name in enumerate(split.names):
            file, _, member = name.partition(":")
            row = ROWS[int(file[0]) * 12 + int(member[:3])]
            assert split.reader.read_bytes(name) == row["bytes"]
            assert split.captions[index] == row["text"]
    assert len(names) == 24


def test_classes_are_folders_in_tar_files_whatever_the_pictures_are_called(tmp_path):
    """Two files have members of the same names, so that the pictures are called FILE:MEMBER."""
    for file in range(2):
        numbered = []
        for i, row in enumerate(ROWS[file * 12 :][:12]):
            numbered.append(with_name(row, f"{'cat' if i % 2 else 'dog'}/{i:03}.png"))
        with tarfile.open(tmp_path / f"{file}.tar", "w") as tar:
            for row in numbered:
                add(tar, row["name"], row["bytes"])
                add(tar, row["name"].replace(".png", ".txt"), row["text"].encode())
    data = load(tmp_path)
    assert data.classes.names == ("cat", "dog")
    split = data.split("train")
    for name, label in zip(split.names, split.labels, strict=True):
        assert data.classes.names[label] == name.split(":")[1].split("/")[0]
    assert b"noise number" not in pickle.dumps(split.reader.source)  # the workers' copy is small


def test_classes_are_folders_in_the_paths_of_pictures_and_not_those_of_their_files(tmp_path):
    for kind in ("cat", "dog"):
        rows = [row | {"name": f"{kind}/{row['name']}"} for row in ROWS]
        for name, table in (("named", image_table(rows)), ("bare", image_table(ROWS))):
            folder = tmp_path / name / kind
            folder.mkdir(parents=True)
            pq.write_table(table.drop_columns(["label"]), folder / "0000.parquet")
    assert load(tmp_path / "named").classes.names == ("cat", "dog")
    bare = load(tmp_path / "bare")  # the same names in both files: they are called by file and row
    assert bare.split("train").names[0].startswith("cat/0000.parquet:")
    assert (bare.num_classes, bare.classes.names) == (1, ())
    assert bare.classes.why_none


def test_columns_are_named_by_key(tmp_path):
    table = image_table(ROWS).rename_columns(["photo", "words", "kind", "often", "style"])
    pq.write_table(table, tmp_path / "a.parquet")
    typed = {"image": "photo", "caption": "words", "label": "kind", "weight": "often"}
    data = load(tmp_path / "a.parquet", columns=Columns(**typed))
    assert data.classes.names == ("blue", "green", "red")
    assert data.split("train").weights.max() == 2
    assert "number" in data.split("train").captions[0]
    assert "photo, words" in refused(tmp_path / "a.parquet", "data.columns.image")
    for role in typed:
        columns = Columns(**typed | {role: "nothing"})
        said = refused(tmp_path / "a.parquet", f"data.columns.{role}", columns=columns)
        assert "words" in said and "style" in said
    unnamed = Columns(image="photo")
    assert "words" in refused(tmp_path / "a.parquet", "data.columns.caption", columns=unnamed)
    load(tmp_path / "a.parquet", columns=unnamed, missing_captions="empty")
    images_of_text = Columns(image="words")
    refused(tmp_path / "a.parquet", "data.columns.image", columns=images_of_text)


def test_class_numbers_of_datasets_have_names(tmp_path):
    table = image_table(ROWS).drop_columns(["label", "weight"])
    table = table.append_column("label", pa.array([i % 2 for i in range(len(ROWS))]))
    feature = {"names": ["wolf", "ant"], "_type": "ClassLabel"}
    metadata = {"huggingface": json.dumps({"info": {"features": {"label": feature}}})}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "a.parquet")
    data = load(tmp_path / "a.parquet", caption_template="a {label}")
    assert data.classes.names == ("ant", "wolf")
    split = data.split("train")
    for index in range(len(split)):
        row = split[index, 0]
        assert row.caption == f"a {data.classes.names[row.label]}"


def test_captions_of_several_kinds(tmp_path):
    folder = write_tar(tmp_path / "lists", [row | {"text": ["one", "two"]} for row in ROWS])
    split = load(folder, captions="one").split("train")
    assert {split[0, ordinal].caption for ordinal in range(20)} == {"one", "two"}
    with tarfile.open(tmp_path / "text.tar", "w") as tar:
        for row in ROWS:
            stem = f"./deep/{row['name'].split('.')[0]}"
            add(tar, f"{stem}.png", row["bytes"])
            add(tar, f"{stem}.txt", b"first line\nsecond line\n")
            add(tar, f"{stem}.cls", b"0\n" if row["label"] == "red" else b"1\n")
    data = load(tmp_path / "text.tar")
    assert data.num_classes == 2
    assert set(data.split("train").captions) == {"first line second line"}
    assert data.split("train").names[0].startswith("deep/")


def test_a_template_makes_captions_of_columns(stored):
    template = "a {{photo}} of {label}, {style}"
    expected = {row["name"]: f"a {{photo}} of {row['label']}, {row['style']}" for row in ROWS}
    for name, place in stored.items():
        make = Images if name == "folder" else StoredPictures
        options = {"path": str(place), "image_size": 16}
        split = make(**options, caption_template=template).split("train")
        assert split.captions == [expected[each] for each in split.names], name
        one = make(**options, caption_template="a {{photo}}").split("train")
        assert set(one.captions) == {"a {photo}"}, name
        with pytest.raises(DataError) as caught:
            make(**options, caption_template="a {colour}")
        assert caught.value.key == "data.caption_template"
        assert "style" in str(caught.value), name
        for wrong in (" ", "a {", "a {}", "{label!r}", "{label:>9}", "{label.upper}"):
            with pytest.raises(UserError) as caught:
                make(**options, caption_template=wrong)
            assert caught.value.key == "data.caption_template", wrong


def test_a_template_with_holes_gives_no_caption(tmp_path):
    write_parquet(tmp_path / "a", [row | {"style": None} for row in ROWS[:2]] + ROWS[2:])
    said = refused(tmp_path / "a", "data.missing_captions", caption_template="a {style}")
    assert ROWS[0]["name"] in said


def test_splits_by_the_names_of_files(tmp_path):
    write_parquet(tmp_path / "data", ROWS[:12], files=1)
    held_back = (
        write_parquet(tmp_path / "more", ROWS[12:], files=1) / "train-00000-of-00001.parquet"
    )
    held_back.rename(tmp_path / "data/test-00000-of-00001.parquet")
    data = load(tmp_path)
    assert sum(len(data.split(name)) for name in SPLITS) == 12
    assert any("data.split" in note for note in data.notes)
    assert set(data.split("train").names) <= {row["name"] for row in ROWS[:12]}
    assert set(load(tmp_path, split="test").split("train").names) <= {
        row["name"] for row in ROWS[12:]
    }
    assert "test-00000" in refused(tmp_path, "data.split", split="valid")


def test_a_repository_of_the_hub_in_the_cache(tmp_path, monkeypatch):
    repository = tmp_path / "datasets--OWNER--NAME"
    (repository / "refs").mkdir(parents=True)
    for revision, rows in (("main", ROWS), ("old", ROWS[:12])):
        (repository / "refs" / revision).write_text(revision)
        write_parquet(repository / "snapshots" / revision / "data", rows)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert len(load("OWNER/NAME").split("train")) == 18
    assert len(load("OWNER/NAME", revision="old").split("train")) == 9
    refused("OWNER/OTHER", "data.path")
    assert "data.revision=new" in refused("OWNER/NAME", "data.path", revision="new")
    files = repository / "snapshots/main/data"
    for path in (files, f"{files}/*.parquet", files / "train-00000-of-00002.parquet"):
        refused(path, "data.revision", revision="old")


def test_a_missing_revision_is_told_apart_from_a_missing_repository(monkeypatch):
    for error_class, key in (
        (RevisionNotFoundError, "data.revision"),
        (RepositoryNotFoundError, "data.path"),
    ):
        error = error_class("not found", response=Mock(headers={}))
        monkeypatch.setattr("huggingface_hub.snapshot_download", Mock(side_effect=error))
        refused("OWNER/NAME", key, revision="new")


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def damage(path, place, content=b"\xff" * 200):
    whole = bytearray(path.read_bytes())
    whole[place : place + len(content)] = content
    path.write_bytes(whole)


def test_damaged_tar_files(tmp_path):
    folder = write_tar(tmp_path / "tar", ROWS, files=1)
    path = folder / "000000.tar"
    sound = path.read_bytes()
    end = sound.rindex(ROWS[-1]["name"].split(".")[0].encode() + b".json") + 1024
    for size in (0, 100, 600, 5000, end - 600, end - 500, end):
        cut(path, size)
        assert "000000.tar" in refused(folder, "data.path"), size
        path.write_bytes(sound)
    damage(path, sound.index(ROWS[5]["name"].encode()))
    refused(folder, "data.path")
    for content in (gzip.compress(sound), b"nothing like that" * 100, bytes(10240)):
        path.write_bytes(content)
        refused(folder, "data.path")
    path.rename(folder / "a.tar.gz")
    refused(folder, "data.path")


def test_texts_in_tar_files_that_cannot_be_read(tmp_path):
    for name, content in (
        ("000.json", b"{broken"),
        ("000.json", b"[1]"),
        ("000.txt", b"caf\xe9"),
        ("000.txt", b"a" * (2**20 + 1)),
    ):
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            add(tar, "000.png", ROWS[1]["bytes"])
            add(tar, name, content)
        assert name in refused(tmp_path / "a.tar", "data.path")


def test_members_lead_nowhere(tmp_path):
    """A name with .. is read from the tar file; a link to a file outside is not followed."""
    outside = tmp_path / "outside.png"
    outside.write_bytes(ROWS[1]["bytes"])
    (tmp_path / "tar").mkdir()
    with tarfile.open(tmp_path / "tar/a.tar", "w") as tar:
        for i, row in enumerate(ROWS[:4]):
            add(tar, f"../outside{i or ''}.png", row["bytes"])
            add(tar, f"../outside{i or ''}.txt", b"x")
        link = tarfile.TarInfo("link.png")
        link.type = tarfile.SYMTYPE
        link.linkname = str(outside)
        tar.addfile(link)
    data = load(tmp_path / "tar")
    assert any("1 links" in note for note in data.notes)
    found = {}
    for split in map(data.split, SPLITS):
        found |= {name: split.reader.read_bytes(name) for name in split.names}
    assert found["../outside.png"] == ROWS[0]["bytes"]
    assert len(found) == 4


def test_damaged_parquet_files(tmp_path):
    folder = write_parquet(tmp_path / "a", ROWS)
    second = folder / "train-00001-of-00002.parquet"
    sound = second.read_bytes()
    for content in (b"", sound[:300], sound[:-10], b"PAR1" + bytes(50)):
        second.write_bytes(content)
        assert second.name in refused(folder, "data.path")
    table = image_table(ROWS)
    columns = table.columns
    for other in (
        pa.table([*columns, columns[0]], names=[*table.column_names, "image"]),
        pa.table([*columns, columns[1]], names=[*table.column_names, "text"]),
        table.drop_columns(["text"]),
        table.append_column("mood", pa.array(["calm"] * len(ROWS))),
        table.set_column(1, "text", pa.array([1] * len(ROWS))),
    ):
        pq.write_table(other, second)
        assert second.name in refused(folder, "data.path")
    second.write_bytes(sound)
    damage(second, 60, b"\xff" * 3000)
    assert second.name in refused(folder, "data.path")


def test_a_picture_without_bytes_or_of_other_bytes(tmp_path):
    """It is named, or left out."""
    for content in (None, b"no picture", ROWS[0]["bytes"][:200]):
        made = [ROWS[0] | {"bytes": content}, *ROWS[1:]]
        folder = write_parquet(tmp_path / str(len(content or b"")), made)
        if content is None or content == b"no picture":
            assert ROWS[0]["name"] in refused(folder, "data.path")
        skipping = load(folder, on_error="skip")
        names = skipping.split("train").names
        for index in range(len(names)):
            skipping.split("train")[index, 0]


def test_folders_that_hold_no_data_set(tmp_path, stored):
    refused(tmp_path / "nowhere", "data.path")
    refused("", "data.path")
    refused(tmp_path, "data.path")
    refused(tmp_path / "*.parquet", "data.path")
    assert "data=images" in refused(stored["folder"], "data.path")
    write_parquet(tmp_path / "both", ROWS)
    write_tar(tmp_path / "both/tar", ROWS)
    refused(tmp_path / "both", "data.path")
    refused(stored["arrow"], "data.split", split="train")
    arrow = tmp_path / "arrow"
    arrow.mkdir()
    (arrow / "state.json").write_text("{}")
    refused(arrow, "data.path")


def test_small_weighted_and_uncaptioned_pictures(tmp_path):
    for i, wrong in enumerate((-1.0, float("inf"), float("nan"))):
        rows = [row | {"weight": 1.0} for row in ROWS]
        rows[20]["weight"] = wrong
        folder = write_parquet(tmp_path / f"wrong{i}", rows)
        reason = refused(folder, "data.columns.weight")
        assert f"train-00001-of-00002.parquet: {ROWS[20]['name']}" in reason
    folder = write_parquet(tmp_path / "zero", [row | {"weight": 0} for row in ROWS])
    refused(folder, "data.columns.weight")
    folder = write_parquet(tmp_path / "a", ROWS)
    refused(folder, "data.image_size", image_size=40)
    folder = write_parquet(tmp_path / "b", [row | {"text": None} for row in ROWS[:3]] + ROWS[3:])
    refused(folder, "data.missing_captions")
    data = load(folder, missing_captions="empty", upscale=True, image_size=21)
    assert any("no caption" in note for note in data.notes)
    assert any("data.upscale" in note for note in data.notes)


def test_text_that_is_not_utf_8(tmp_path):
    bad = pa.array([b"caf\xe9"] * len(ROWS), pa.binary()).view(pa.string())
    table = image_table(ROWS)
    pq.write_table(table.set_column(1, "text", bad), tmp_path / "a.parquet")
    assert "a.parquet" in refused(tmp_path / "a.parquet", "data.path")


@pytest.mark.parametrize("name", FORMATS)
def test_a_column_holds_the_depth_maps_of_the_pictures(with_depth, name):
    column = "depth.png" if name == "tar" else "depth"
    for options in ({}, {"crop": "random", "flip": True}, {"buckets": True, "bucket_step": 4}):
        data = load(with_depth[name], columns=Columns(depth=column), **options)
        assert sum(len(data.split(split)) for split in SPLITS) == len(ROWS)
        for split in map(data.split, SPLITS):
            for index in range(len(split)):
                row = pickle.loads(pickle.dumps(split))[index, index + 3]
                assert row.depth.shape == (1, *row.image.shape[1:])
                torch.testing.assert_close(row.depth * 2 - 1, row.image[:1], rtol=0, atol=0.02)


def test_what_is_wrong_with_a_column_of_depth_maps_is_named(with_depth, tmp_path):
    key = "data.columns.depth"
    for name, column in (("parquet", "nearness"), ("arrow", "text"), ("tar", "near.png")):
        assert column in refused(with_depth[name], key, columns=Columns(depth=column))
    both = {"columns": Columns(depth="depth"), "depth": str(tmp_path)}
    refused(with_depth["parquet"], "data.depth", **both)
    without = stored_pictures.with_depth(ROWS)
    without[3]["depth"] = None
    data = load(write_parquet(tmp_path / "parquet", without), columns=Columns(depth="depth"))
    with pytest.raises(DataError) as caught:
        for split in map(data.split, SPLITS):
            for index in range(len(split)):
                split[index, index]
    assert caught.value.key == key
    with tarfile.open(tmp_path / "some.tar", "w") as tar:
        for row in ROWS:
            add(tar, row["name"], row["bytes"])
        first = stored_pictures.with_depth(ROWS)[0]
        add(tar, f"{first['name'][:3]}.depth.png", first["depth"])
    options = {"columns": Columns(depth="depth.png"), "missing_captions": "empty"}
    assert ROWS[1]["name"] in refused(tmp_path / "some.tar", key, **options)
