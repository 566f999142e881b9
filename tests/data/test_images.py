"""A folder of captioned pictures: the layouts agree, every mistake is one paragraph that names the
key, splits hold their rule.
"""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from sdtrain.data import reader
from sdtrain.data.images import Images
from sdtrain.errors import DataError, UserError

NAMES = ["a.png", "b c.jpg", "sub/d.webp", "sub/é.png", "z.PNG"]
CAPTIONS = ["a cat, asleep", 'the "second"', "drei: Bäume [x]", "日本", "last = one"]


def paint(file, size=(40, 36), seed=0):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    ).save(file)


def captioned(folder, layout="txt", names=NAMES, captions=CAPTIONS):
    for i, name in enumerate(names):
        paint(folder / name, seed=i)
    if layout == "txt":
        for name, caption in zip(names, captions, strict=True):
            (folder / name).with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
    elif layout == "jsonl":
        rows = [{"file_name": n, "text": c} for n, c in zip(names, captions, strict=True)]
        (folder / "metadata.jsonl").write_text(
            "\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8"
        )
    else:
        quoted = ['"' + c.replace('"', '""') + '"' for c in captions]
        text = "file_name,caption\r\n" + "".join(
            f"{n},{c}\r\n" for n, c in zip(names, quoted, strict=True)
        )
        (folder / "metadata.csv").write_bytes(
            b"\xef\xbb\xbf" + text.encode()
        )  # with a BOM, as Excel writes it
    return folder


def pairs(data):
    splits = data.split("train"), data.split("validation")
    return sorted(
        pair for split in splits for pair in zip(split.names, split.captions, strict=True)
    )


@pytest.mark.parametrize("layout", ["txt", "jsonl", "csv"])
def test_layouts_give_the_same_captions(tmp_path, layout):
    data = Images(path=str(captioned(tmp_path, layout)))
    assert pairs(data) == sorted(zip(NAMES, CAPTIONS, strict=True))
    assert len(data.split("train")) == 4
    assert data.num_classes == 1
    row = data.split("validation")[0, 0]
    assert (row.caption, row.label, row.depth) == (data.split("validation").captions[0], 0, None)
    assert row.image.shape == (3, 32, 32)
    assert row.image.is_contiguous()


def test_small_things_that_captions_carry(tmp_path):
    captioned(
        tmp_path, captions=["\ufeffwith BOM", "nul\0inside", "two\r\nlines", " spaces  ", "plain"]
    )
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "README.txt").write_text("no caption")
    assert [c for _, c in pairs(Images(path=str(tmp_path)))] == [
        "with BOM",
        "nulinside",
        "two lines",
        "spaces",
        "plain",
    ]


def test_two_captions_of_a_picture_stay_in_one_split(tmp_path):
    names = [f"{i}.png" for i in range(8)] * 2
    data = Images(
        path=str(captioned(tmp_path, "jsonl", names, [f"caption {i}" for i in range(16)]))
    )
    assert len(pairs(data)) == 16
    assert len(data.split("validation")) == 4
    assert not set(data.split("train").names) & set(data.split("validation").names)


# What is wrong, the words its paragraph must hold, and what to do to a sound folder of the given
# layout.
def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def rows(*values):
    return write(
        "metadata.jsonl",
        "\n".join(v if isinstance(v, str) else json.dumps(v) for v in values).encode(),
    )


def sound(*more):
    return rows(*[{"file_name": n, "text": c} for n, c in zip(NAMES, CAPTIONS, strict=True)], *more)


def drop_captions(*names):
    return lambda folder: [(folder / name).with_suffix(".txt").unlink() for name in names]


def shrink(folder):
    paint(folder / "a.png", (20, 90))
    paint(folder / "sub/d.webp", (50, 31))


MISTAKES = {
    "no caption at all": (
        "txt",
        drop_captions(*NAMES),
        ["data.path", "none has a caption", "data.missing_captions=empty"],
    ),
    "two without caption": (
        "txt",
        drop_captions("b c.jpg", "z.PNG"),
        ["data.missing_captions=empty", "2 of 5", "first b c.jpg"],
    ),
    "empty caption": (
        "txt",
        write("a.txt", b" \n"),
        ["data.missing_captions=empty", "1 of 5", "first a.png"],
    ),
    "not UTF-8": (
        "txt",
        write("a.txt", b"caf\xe9"),
        ["data.path", "a.txt", "UTF-8", "byte 3 is 0xe9"],
    ),
    "both metadata": ("csv", sound(), ["data.path", "metadata.jsonl and metadata.csv"]),
    "rows of missing pictures": (
        "jsonl",
        sound({"file_name": "x.png", "text": "x"}),
        ["data.path", "1 of 6 rows", "x.png"],
    ),
    "picture without row": (
        "jsonl",
        lambda f: paint(f / "e.png"),
        ["data.missing_captions=empty", "1 of 6 pictures", "no row", "e.png"],
    ),
    "null caption": (
        "jsonl",
        sound({"file_name": "a.png", "text": None}),
        ["data.missing_captions=empty", "1 of 6", "first a.png"],
    ),
    "malformed JSON": (
        "jsonl",
        sound("{'file_name': 1}"),
        ["data.path", "metadata.jsonl", "line 6", "not JSON"],
    ),
    "JSON but no object": (
        "jsonl",
        sound([1, 2]),
        ["data.path", "line 6", "must be an object", "[1, 2]"],
    ),
    "no file_name": (
        "jsonl",
        sound({"image": "a.png", "text": "x"}),
        ["data.path", "file_name", "line 6 has image, text"],
    ),
    "no text": (
        "jsonl",
        rows({"file_name": "a.png", "label": 3}),
        ["data.path", "text (or caption)", "line 1 has file_name, label"],
    ),
    "empty metadata": ("jsonl", rows(), ["data.path", "text (or caption)", "has none"]),
    "caption is a number": (
        "jsonl",
        sound({"file_name": "a.png", "text": 3}),
        ["data.path", "line 6", "must be text, and is 3"],
    ),
    "file_name is a number": (
        "jsonl",
        sound({"file_name": 3, "text": "x"}),
        ["data.path", "line 6", "file_name", "and is 3"],
    ),
    "path leads outside": (
        "jsonl",
        sound({"file_name": "sub/../../x.png", "text": "x"}),
        ["data.path", "line 6", "outside the folder"],
    ),
    "absolute path": (
        "jsonl",
        sound({"file_name": "/etc/x.png", "text": "x"}),
        ["data.path", "line 6", "outside the folder"],
    ),
    "unquoted comma": (
        "csv",
        write("metadata.csv", b"file_name,text\na.png,a cat, asleep\n"),
        ["data.path", "line 2", "3 fields", "double quotes"],
    ),
    "open quote": (
        "csv",
        write("metadata.csv", b'file_name,text\na.png,"a cat\n'),
        ["data.path", "metadata.csv", "line 2", "not CSV"],
    ),
    "semicolons": (
        "csv",
        write("metadata.csv", b"file_name;text\na.png;a cat\n"),
        ["data.path", "line 2 has file_name;text"],
    ),
    "unreadable picture": (
        "txt",
        write("a.png", b"nothing"),
        ["data.path", "1 of 5 pictures", "a.png", "PNG, JPEG"],
    ),
    "a format not read": ("txt", write("i.heic", b"nothing"), ["data.path", "i.heic"]),
    "too small": (
        "txt",
        shrink,
        [
            "data.image_size",
            "data.upscale",
            "2 of 5",
            "a.png, sub/d.webp",
            "data.image_size to 20 or less",
        ],
    ),
    "file name of bytes": (
        "txt",
        lambda f: os.rename(f / "a.png", os.fsdecode(bytes(f) + b"/\xff.png")),
        ["data.path", r"\udcff.png"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_the_folder(tmp_path, mistake):
    layout, spoil, expected = MISTAKES[mistake]
    path = str(captioned(tmp_path, layout))
    Images(path=path)  # sound, until it is spoilt
    if mistake == "empty caption":
        (tmp_path / "a.txt").unlink()
    spoil(tmp_path)
    options = {"missing_captions": "empty"} if mistake == "a format not read" else {}
    with pytest.raises(DataError) as caught:
        Images(path=path, **options)
    for words in expected:
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_link_may_not_lead_metadata_outside(tmp_path):
    folder = captioned(tmp_path / "inside", "jsonl")
    paint(tmp_path / "outside.png")
    (folder / "a.png").unlink()
    (folder / "a.png").symlink_to(tmp_path / "outside.png")
    with pytest.raises(DataError, match="leads outside the folder"):
        Images(path=str(folder))


def test_folders_that_are_none(tmp_path):
    paint(tmp_path / "one" / "a.png")
    (tmp_path / "one" / "a.txt").write_text("one")
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    for path, words in [
        (tmp_path / "none", "does not exist"),
        ("", "does not exist"),
        (tmp_path / "one" / "a.png", "is a file"),
        (tmp_path / "empty", "holds no pictures"),
        (tmp_path / "one", "at least 2"),
    ]:
        with pytest.raises(DataError, match=r"data\.path=.*" + words):
            Images(path=str(path))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_size", 0),
        ("crop", "middle"),
        ("validation_fraction", 0.0),
        ("validation_fraction", 0.3),
        ("missing_captions", "skip"),
        ("background", [0, 0]),
        ("background", [0, 0, 256]),
    ],
)
def test_bad_options(tmp_path, key, value):
    with pytest.raises(UserError) as caught:
        Images(path=str(captioned(tmp_path)), **{key: value})
    error = caught.value
    assert (error.exit_code, error.key, error.value) == (2, f"data.{key}", value)
    assert str(error).startswith(f"data.{key}=")
    assert str(error).endswith(f"Change data.{key}.")


def test_missing_captions_may_be_empty(tmp_path):
    captioned(tmp_path)
    drop_captions("a.png")(tmp_path)
    assert dict(pairs(Images(path=str(tmp_path), missing_captions="empty"))) == {
        **dict(zip(NAMES, CAPTIONS, strict=True)),
        "a.png": "",
    }
    sound()(tmp_path)
    paint(tmp_path / "new.png")
    assert dict(pairs(Images(path=str(tmp_path), missing_captions="empty")))["new.png"] == ""


def test_broken_pixels_name_the_picture(tmp_path):
    captioned(tmp_path)
    file = tmp_path / "a.png"
    file.write_bytes(file.read_bytes()[:-2000])  # the header is sound, so construction passes
    data = Images(path=str(tmp_path))
    split = next(s for s in map(data.split, ("train", "validation")) if "a.png" in s.names)
    with pytest.raises(DataError, match=r"a\.png"):
        split[split.names.index("a.png"), 0]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    names = [f"{i:03d}.png" for i in range(100)]
    return captioned(
        tmp_path_factory.mktemp("many"), "jsonl", names, [f"caption {name}" for name in names]
    )


def test_splits(many):
    data = Images(path=str(many), crop="random", flip=True)
    train = data.split("train")
    validation = data.split("validation")
    assert (len(train), len(validation)) == (75, 25)
    assert sorted(train.names + validation.names) == sorted(p.name for p in many.glob("*.png"))
    assert len(Images(path=str(many), validation_fraction=0.25).split("validation")) == 25
    assert Images(path=str(many), seed=1).split("validation").names != validation.names
    # validation: the centre, whatever the ordinal; training moves with it
    assert len({validation[3, o].image.numpy().tobytes() for o in range(20)}) == 1
    assert len({train[3, o].image.numpy().tobytes() for o in range(20)}) > 5


def test_example_prompts(many):
    data = Images(path=str(many))
    captions = data.split("train").captions
    prompts = data.example_prompts(5)
    assert [captions.index(p) for p in prompts] == [0, 15, 30, 45, 60]
    assert len(data.example_prompts(200)) == 200


def test_pixels_are_those_of_the_file(many):
    split = Images(path=str(many), image_size=36, crop="center", flip=False).split("train")
    expected = (
        torch.from_numpy(np.array(Image.open(many / split.names[7]))).permute(2, 0, 1)[:, :, 2:38]
        / 127.5
        - 1
    )
    assert torch.allclose(split[7, 0].image, expected, atol=1e-6)


def test_background_shows_through(tmp_path):
    captioned(tmp_path)
    Image.new("RGBA", (40, 40), (255, 0, 0, 0)).save(tmp_path / "a.png")
    data = Images(path=str(tmp_path), background=(0, 0, 255))
    split = next(s for s in map(data.split, ("train", "validation")) if "a.png" in s.names)
    assert split[split.names.index("a.png"), 0].image.amax((1, 2)).tolist() == [-1, -1, 1]


def test_cache_changes_nothing_and_keeps_to_its_limit(many, monkeypatch):
    split = Images(path=str(many)).split("train")
    first = [split[i, 7].image for i in range(10)]
    assert all(torch.equal(split[i, 7].image, first[i]) for i in range(10))
    assert len(split.reader._cache) == 10
    copy = pickle.loads(pickle.dumps(split))
    assert not copy.reader._cache
    assert torch.equal(copy[5, 7].image, first[5])
    monkeypatch.setattr(
        reader, "CACHE_BYTES", 3 * 32 * 36 * 4
    )  # 40 x 36 becomes 36 x 32: room for four at most
    split = Images(path=str(many)).split("train")
    assert all(torch.equal(split[i, 7].image, first[i]) for i in range(10))
    assert 0 < len(split.reader._cache) <= 4


def test_a_split_knows_sizes_and_files_by_index(tmp_path):
    captioned(tmp_path)
    paint(tmp_path / "a.png", size=(33, 64))
    upright = Image.Exif()
    upright[0x0112] = 6
    Image.new("RGB", (70, 40)).save(tmp_path / "b c.jpg", exif=upright)
    data = Images(path=str(tmp_path))
    sizes = {}
    for split in map(data.split, ("train", "validation")):
        assert split.weights is None
        for name, size in zip(split.names, split.sizes.tolist(), strict=True):
            sizes[name] = size
            assert split.reader.read_bytes(name) == (tmp_path / name).read_bytes()
    assert sizes["a.png"] == [33, 64] and sizes["b c.jpg"] == [40, 70]
    assert sizes["z.PNG"] == [40, 36]


def test_pictures_decode_in_loader_workers(many):
    split = Images(path=str(many)).split("train")
    loader = torch.utils.data.DataLoader(
        split, batch_size=None, sampler=[(i, i) for i in range(6)], num_workers=1
    )
    assert all(torch.equal(row.image, split[i, i].image) for i, row in enumerate(loader))


def change_caption(folder):
    (folder / "03.txt").write_text("a dog\n")


def change_size(folder):
    paint(folder / "03.png", size=(50, 50))


def change_pixels(folder):
    """Another picture of as many bytes."""
    content = bytearray((folder / "03.png").read_bytes())
    content[-20] ^= 1
    (folder / "03.png").write_bytes(content)


def remove(folder):
    for name in ("03.png", "03.txt"):
        (folder / name).unlink()


@pytest.mark.slow
def test_a_run_goes_on_with_the_same_pictures_and_captions_only(train_tiny, tmp_path):
    names = [f"{i:02}.png" for i in range(12)]
    folder = captioned(tmp_path / "pictures", names=names, captions=["a cat"] * 12)
    words = [
        "data=images",
        f"data.path={folder}",
        "model/autoencoder=pixels",
        "data.num_workers=0",
        "callbacks=none",
        "validation=none",
    ]
    run = tmp_path / "run"
    assert train_tiny(run, *words, "trainer.max_images=16").code == 0
    shutil.copytree(folder, tmp_path / "kept")
    more = ["resume=auto", "trainer.max_images=32"]
    for change in (change_caption, change_size, change_pixels, remove):
        change(folder)
        result = train_tiny(run, *words, *more)
        assert result.code == 2, change.__name__
        assert "data.sha256: " in result.err, change.__name__
        assert "the pictures or captions in data.path changed" in result.err
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "kept", folder)
    result = train_tiny(run, *words, *more)
    assert result.code == 0, result.err
