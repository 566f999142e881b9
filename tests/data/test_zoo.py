"""Odd pictures and captions: each does what the tables of data/README.md say of it, whether bad
ones end the run or are skipped.
"""

import io
import json
import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdtrain.data.images import Images
from sdtrain.errors import DataError

TABLES = (Path(__file__).parents[2] / "data" / "README.md").read_text(encoding="utf-8")
COLOUR = (200, 40, 90)
BLUE = (0, 0, 255)
WHITE = (255, 255, 255)
PLAIN = Image.new("RGB", (40, 40), COLOUR)
OTHER = Image.new("RGB", (40, 40), BLUE)
NOISY = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
# Orientation -> how a camera that writes it has turned an upright picture (EXIF 2.32, tag 0x0112).
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def encoded(picture, format="PNG", **options):
    stream = io.BytesIO()
    picture.save(stream, format, **options)
    return stream.getvalue()


def chunk(kind, content):
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def png(*extra, width=40, height=40, depth=8, colour=2, pixels=(b"\0" + bytes(COLOUR) * 40) * 40):
    """A PNG by hand; pixels None: without any."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = b"".join(chunk(*each) for each in extra) + (
        b"" if pixels is None else chunk(b"IDAT", zlib.compress(pixels))
    )
    return b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b"")


def spoilt(content, place):
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


def turned(orientation):
    """Upright, its left half is COLOUR."""
    upright = Image.new("RGB", (40, 60), BLUE)
    upright.paste(COLOUR, (0, 0, 20, 60))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright.transpose(STORED[orientation]) if orientation in STORED else upright
    return encoded(stored, exif=exif)


def without_adobe(content):
    place = content.index(b"\xff\xee")
    return (
        content[:place]
        + content[place + 2 + struct.unpack(">H", content[place + 2 : place + 4])[0] :]
    )


INK = Image.new("CMYK", (40, 40), (55, 215, 165, 0))
SOUND = png()
DATA = SOUND.index(b"IDAT") + 4
DATA_BYTES = struct.unpack(">I", SOUND[DATA - 8 : DATA - 4])[0]
# The picture's name in the table -> (file name, its bytes or what makes it, the colour of its top
# left third or words of the refusal).
PICTURES = {
    "grey PNG of 16 bits": (
        "x.png",
        encoded(Image.fromarray(np.full((40, 40), 90 * 257, np.uint16))),
        (90, 90, 90),
    ),
    "RGB PNG of 16 bits": (
        "x.png",
        png(depth=16, pixels=(b"\0" + struct.pack(">HHH", *(v * 257 for v in COLOUR)) * 40) * 40),
        COLOUR,
    ),
    "TIFF of int32 in 0..65535": (
        "x.tif",
        encoded(Image.new("I", (40, 40), 90 * 257), "TIFF"),
        (90, 90, 90),
    ),
    "TIFF of int32 beyond 65535": (
        "x.tif",
        encoded(Image.new("I", (40, 40), 900_000), "TIFF"),
        "900000",
    ),
    "TIFF of floating point": (
        "x.tiff",
        encoded(Image.new("F", (40, 40), 0.5), "TIFF"),
        "floating-point",
    ),
    "TIFF of several pages": (
        "x.tif",
        encoded(PLAIN, "TIFF", save_all=True, append_images=[OTHER]),
        COLOUR,
    ),
    "CMYK JPEG": ("x.jpg", encoded(INK, "JPEG", quality=95), COLOUR),
    "CMYK JPEG without Adobe's mark": (
        "x.jpg",
        without_adobe(encoded(INK, "JPEG", quality=95)),
        COLOUR,
    ),
    "YCbCr TIFF": (
        "x.tif",
        encoded(Image.new("YCbCr", (40, 40), (90, 128, 128)), "TIFF"),
        (90, 90, 90),
    ),
    "progressive JPEG": ("x.jpg", encoded(PLAIN, "JPEG", progressive=True, quality=95), COLOUR),
    "grey JPEG": ("x.jpeg", encoded(Image.new("L", (40, 40), 90), "JPEG"), (90, 90, 90)),
    "JPEG 2000": ("x.jp2", encoded(PLAIN, "JPEG2000"), COLOUR),
    "BMP": ("x.bmp", encoded(PLAIN, "BMP"), COLOUR),
    "PPM": ("x.ppm", encoded(PLAIN, "PPM"), COLOUR),
    "palette": ("x.png", encoded(PLAIN.quantize(4)), COLOUR),
    "palette with a transparent entry": (
        "x.gif",
        encoded(Image.new("P", (40, 40), 0), "GIF", transparency=0),
        WHITE,
    ),
    "RGBA": ("x.png", encoded(Image.new("RGBA", (40, 40), (*COLOUR, 0))), WHITE),
    "grey with alpha": ("x.png", encoded(Image.new("LA", (40, 40), (0, 0))), WHITE),
    "one bit": ("x.png", encoded(Image.new("1", (40, 40), 1)), WHITE),
    **{
        f"EXIF orientation {orientation}": ("x.png", turned(orientation), COLOUR)
        for orientation in range(1, 9)
    },
    "broken EXIF": ("x.jpg", encoded(PLAIN, "JPEG", quality=95, exif=b"Exif\0\0nonsense"), COLOUR),
    "broken ICC profile": ("x.png", encoded(PLAIN, icc_profile=b"nonsense"), COLOUR),
    "animated GIF": ("x.gif", encoded(PLAIN, "GIF", save_all=True, append_images=[OTHER]), COLOUR),
    "animated WebP": (
        "x.webp",
        encoded(PLAIN, "WEBP", save_all=True, append_images=[OTHER], lossless=True),
        COLOUR,
    ),
    "animated PNG": ("x.png", encoded(PLAIN, save_all=True, append_images=[OTHER]), COLOUR),
    "JPEG named .png": ("x.png", encoded(PLAIN, "JPEG", quality=95), COLOUR),
    "PNG with a wrong checksum of pixels that inflate well": (
        "x.png",
        spoilt(SOUND, DATA + DATA_BYTES),
        COLOUR,
    ),
    "PNG with a wrong checksum of its header": (
        "x.png",
        spoilt(SOUND, 29),
        "no format that can be read",
    ),
    "PNG with broken pixels": ("x.png", spoilt(SOUND, DATA + 4), "broken data stream"),
    "PNG without pixels": ("x.png", png(pixels=None), "cannot load this image"),
    "PNG with a text chunk of 2 MB": (
        "x.png",
        png((b"tEXt", b"Comment\0" + b"x" * 2_000_000)),
        COLOUR,
    ),
    "PNG with a text chunk that inflates to 5 MB": (
        "x.png",
        png((b"zTXt", b"C\0\0" + zlib.compress(bytes(5_000_000)))),
        "Decompressed data too large",
    ),
    "cut JPEG": ("x.jpg", encoded(NOISY, "JPEG")[:-900], "truncated"),
    "cut PNG": ("x.png", encoded(NOISY)[:2000], "truncated"),
    "no bytes": ("x.png", b"", "no format that can be read"),
    "text named .png": ("x.png", b"a cat", "no format that can be read"),
    "SVG named .png": (
        "x.png",
        b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "no format that can be read",
    ),
    "EPS named .png": (
        "x.png",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n",
        "no format that can be read",
    ),
    "HEIC": ("x.heic", b"\0\0\0\x18ftypheic", "no format that can be read"),
    "144 megapixels in 17 kB": (
        "x.png",
        png(width=12_000, height=12_000, depth=1, colour=0, pixels=bytes(1501 * 12_000)),
        "144000000",
    ),
    "one pixel": ("x.png", encoded(Image.new("RGB", (1, 1))), "data.upscale"),
    "1 x 5000": ("x.png", encoded(Image.new("RGB", (1, 5000))), "data.upscale"),
    "16 x 5000": ("x.png", encoded(Image.new("RGB", (16, 5000), COLOUR)), COLOUR),
    "link to nothing": ("x.png", lambda file: file.symlink_to("nowhere.png"), "x.png"),
    "pipe": ("x.png", os.mkfifo, "x.png"),
    "without permission": (
        "x.png",
        lambda file: (file.write_bytes(SOUND), file.chmod(0)),
        "Permission denied",
    ),
    "link to a picture outside the folder": (
        "x.png",
        lambda file: (
            (file.parents[1] / "out.png").write_bytes(SOUND),
            file.symlink_to("../out.png"),
        ),
        COLOUR,
    ),
    "folder named x.png": (
        "x.png/y.png",
        lambda file: (file.parent.mkdir(), file.write_bytes(SOUND)),
        COLOUR,
    ),
    "vanishes after the start": ("x.png", SOUND, "No such file"),
}


def rows(head):
    """The table under `head` as {name: what it is}."""
    table = TABLES.partition(f"| {head} | is | how |\n|---|---|---|\n")[2].partition("\n\n")[0]
    return dict(
        re.fullmatch(r"\| (.+?) \| (.+?) \|.*\|", row).groups() for row in table.splitlines()
    )


@pytest.fixture
def folder(tmp_path):
    """Eight sound pictures with captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(8):
        (folder / f"{i}.png").write_bytes(encoded(OTHER))
        (folder / f"{i}.txt").write_text("plain")
    return folder


def everywhere(data):
    """Each row of both splits: (name, row)."""
    return [
        (name, split[i, i])
        for split in map(data.split, ("train", "validation"))
        for i, name in enumerate(split.names)
    ]


OPTIONS = {"image_size": 16, "flip": False, "crop": "center"}


def is_(name):
    """What the table says of a picture."""
    return rows("picture")[re.sub(r"orientation \d", "orientation 1 to 8", name)]


def place(folder, name, file_name):
    """Put that picture, with the caption "odd", into the folder."""
    content = PICTURES[name][1]
    file = folder / file_name
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        content(file)
    file.with_suffix(".txt").write_text("odd")
    return file


def test_each_picture_is_read_or_refused_at_start_or_while_training():
    assert {is_(name) for name in PICTURES} == {"read", "at start", "while training"}


def test_pictures_that_are_read(folder):
    """All of them in one folder, beside sound ones."""
    files = {}
    for number, name in enumerate(PICTURES):
        if is_(name) == "read":
            files[name] = f"odd{number}-{PICTURES[name][0]}"
            place(folder, name, files[name])
    skipping = Images(path=str(folder), **OPTIONS, on_error="skip")
    found = dict(everywhere(skipping))
    failing = dict(everywhere(Images(path=str(folder), **OPTIONS)))
    assert len(found) == 8 + len(files)
    for name, file_name in files.items():
        row = found[file_name]
        assert row.caption == "odd", name
        assert not row.skipped, name
        colour = (row.image[:, :5, :5].mean((1, 2)) + 1) * 127.5
        assert (colour - torch.tensor(PICTURES[name][2])).abs().max() <= 3, name
        assert torch.equal(failing[file_name].image, row.image), name
    with_frames = [name for name in files if name.startswith("animated") or "pages" in name]
    (note,) = skipping.notes
    assert note.startswith(f"{len(with_frames)} pictures have several frames")
    named = {name for name in files if files[name] in note}  # the first three
    assert named < set(with_frames)
    assert len(named) == 3


@pytest.mark.parametrize("name", [name for name in PICTURES if is_(name) == "at start"])
def test_pictures_that_are_refused_at_start(folder, name):
    if name == "without permission" and os.geteuid() == 0:
        pytest.skip("root may read everything")
    file_name, _, expected = PICTURES[name]
    place(folder, name, file_name)
    with pytest.raises(DataError, match=rf"1 of 9 .*{file_name}") as refused:
        Images(path=str(folder), **OPTIONS)
    assert expected in str(refused.value)
    assert "data.on_error=skip" in str(refused.value)
    data = Images(path=str(folder), **OPTIONS, on_error="skip")
    assert file_name in data.notes[0]
    assert expected in data.notes[0]
    assert len(everywhere(data)) == 8


@pytest.mark.parametrize("name", [name for name in PICTURES if is_(name) == "while training"])
def test_pictures_that_are_refused_while_training(folder, name):
    file_name, _, expected = PICTURES[name]
    file = place(folder, name, file_name)
    failing = Images(path=str(folder), **OPTIONS)
    skipping = Images(path=str(folder), **OPTIONS, on_error="skip")
    if name == "vanishes after the start":
        file.unlink()
    found = dict(everywhere(skipping))
    assert len(found) == 9
    assert not skipping.notes
    with pytest.raises(DataError, match=file_name) as refused:
        everywhere(failing)
    assert expected in str(refused.value)
    assert found[file_name].caption == "plain"
    assert found[file_name].skipped[0][0] == file_name


def beside(content):
    return lambda folder: (folder / "0.txt").write_bytes(content)


def listed(*more):
    return line_of(*map(json.dumps, more))


def line_of(*more):
    lines = [json.dumps({"file_name": f"{i}.png", "text": "plain"}) for i in range(1, 8)]
    return lambda folder: (folder / "metadata.jsonl").write_text("\n".join([*lines, *more]))


def renamed(name):
    return lambda folder: [
        (folder / f"0{end}").rename(folder / f"{name}{end}") for end in (".png", ".txt")
    ]


def link_out(folder):
    (folder / "0.txt").unlink()
    (folder / "0.txt").symlink_to("/etc/passwd")


def comma(folder):
    (folder / "0.png").rename(folder / 'a, "b".png')
    (folder / "metadata.csv").write_text(
        'file_name,text\n"a, ""b"".png","one, two"\n'
        + "".join(f"{i}.png,plain\n" for i in range(1, 8))
    )


# The caption's name in the table -> (what to do to the folder, the captions that are not "plain",
# or words of the refusal).
CAPTIONS = {
    "missing": (lambda folder: (folder / "0.txt").unlink(), "data.missing_captions"),
    "empty": (beside(b""), "data.missing_captions"),
    "only white space": (beside(b" \t\n"), "data.missing_captions"),
    "null in metadata": (listed({"file_name": "0.png", "text": None}), "data.missing_captions"),
    "BOM": (beside(b"\xef\xbb\xbfa cat"), ["a cat"]),
    "not UTF-8": (beside(b"caf\xe9"), "byte 3 is 0xe9"),
    "UTF-16": (beside("a cat".encode("utf-16")), "not UTF-8"),
    "NUL": (beside(b"a c\0at"), ["a cat"]),
    "CRLF": (beside(b"a cat\r\nasleep\r\n"), ["a cat asleep"]),
    "emoji": (beside("🐈 asleep".encode()), ["🐈 asleep"]),
    "Chinese": (beside("一只猫".encode()), ["一只猫"]),
    "right to left": (beside("חתול ישן".encode()), ["חתול ישן"]),
    "longer than the tokenizer takes": (beside(b"cat " * 500), ["cat " * 499 + "cat"]),
    "file name with comma and quotes": (comma, ["one, two"]),
    "file name with a line break": (renamed("a\nb"), "not printable text"),
    ".txt without a picture": (lambda folder: (folder / "README.txt").write_text("odd"), []),
    "a link out of the folder": (link_out, "a link to a file outside the folder"),
    "row without a picture": (
        listed({"file_name": "0.png", "text": "plain"}, {"file_name": "x.png", "text": "odd"}),
        "1 of 9 rows",
    ),
    "two rows of a picture": (
        listed({"file_name": "0.png", "text": "odd"}, {"file_name": "0.png", "text": "odder"}),
        ["odd", "odder"],
    ),
    "row that leads outside": (
        listed({"file_name": "../0.png", "text": "odd"}),
        "leads outside the folder",
    ),
    "number for a caption": (listed({"file_name": "0.png", "text": 3}), "must be text"),
    "half a character": (
        listed({"file_name": "0.png", "text": "a \ud800 cat"}),
        "line 8: the caption must be text",
    ),
    "NUL in a row's file name": (
        listed({"file_name": "0.png\0", "text": "odd"}),
        "line 8: file_name must be the name of a picture",
    ),
    "row with a number of 5000 digits": (
        line_of('{"file_name": "0.png", "text": "odd", "size": ' + "9" * 5000 + "}"),
        "line 8, is not JSON that can be read",
    ),
    "row of 100000 brackets": (
        line_of("[" * 100_000 + "]" * 100_000),
        "line 8, is not JSON that can be read",
    ),
}


@pytest.mark.parametrize("on_error", ["fail", "skip"])
@pytest.mark.parametrize("name", CAPTIONS)
def test_odd_captions(folder, name, on_error):
    spoil, expected = CAPTIONS[name]
    spoil(folder)
    if isinstance(expected, str):
        assert rows("caption")[name] == "refused"
        with pytest.raises(DataError, match=re.escape(expected)):
            Images(path=str(folder), image_size=16, on_error=on_error)
    else:
        data = Images(path=str(folder), image_size=16, on_error=on_error)
        assert (
            rows("caption")[name] == "read"
            and sorted(row.caption for _, row in everywhere(data) if row.caption != "plain")
            == expected
        )


def test_the_tables_and_these_lists_have_the_same_rows():
    assert list(rows("picture")) == list(
        dict.fromkeys(re.sub(r"orientation \d", "orientation 1 to 8", name) for name in PICTURES)
    )
    assert list(rows("caption")) == list(CAPTIONS)
    assert len(PICTURES["144 megapixels in 17 kB"][1]) < 20_000


@pytest.mark.slow
def test_captions_that_are_cut_are_counted_at_the_start(train_tiny, folder, tmp_path):
    for file in folder.glob("*.txt"):
        file.write_text("cat " * (500 if file.name < "4" else 5))
    words = [
        "data=images",
        f"data.path={folder}",
        "model/autoencoder=pixels",
        "data.image_size=16",
        "data.num_workers=0",
        "data.batch_size=4",
    ]
    short = ["trainer.max_images=4", "callbacks=none", "validation=none"]
    result = train_tiny(tmp_path / "run", *words, *short)
    assert result.code == 0, result.err
    cut = sum(name < "4" for name in Images(path=str(folder), image_size=16).split("train").names)
    assert f"{cut} of 6 captions have more than model.conditioner.max_length=24 tokens" in " ".join(
        result.out.split()
    )


MEASURED = '''
"""Prints by how many MB the peak of this process grew while the picture was opened.

UNGUARDED: nobody looks at its header first.
"""

import os
import sys
from pathlib import Path

from PIL import Image

from sdtrain.data import decode
from sdtrain.errors import DataError


def peak():
    """kB. Not getrusage's, which begins with that of the process that started this one."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


sound, large = sys.argv[1:]
decode.open_picture(sound)
if os.environ.get("UNGUARDED"):
    decode.PIXEL_LIMIT, Image.MAX_IMAGE_PIXELS = 10**12, None
before, refused = peak(), False
try:
    decode.open_picture(large)
except DataError:
    refused = True
print(refused, (peak() - before) / 1024)
'''


def growth(folder, **env):
    (folder / "large.png").write_bytes(PICTURES["144 megapixels in 17 kB"][1])
    (folder / "measured.py").write_text(MEASURED)
    command = [
        sys.executable,
        str(folder / "measured.py"),
        str(folder / "0.png"),
        str(folder / "large.png"),
    ]
    refused, megabytes = subprocess.run(
        command, env=os.environ | env, capture_output=True, text=True, check=True
    ).stdout.split()
    return refused == "True", float(megabytes)


@pytest.mark.slow
def test_a_picture_that_claims_144_megapixels_is_refused_before_memory_is_taken(folder):
    refused, megabytes = growth(folder)
    assert refused and megabytes < 20


@pytest.mark.slow
def test_without_a_look_at_its_header_it_would_take_memory(folder):
    """The twin."""
    refused, megabytes = growth(folder, UNGUARDED="1")
    assert not refused and megabytes > 100
