"""The emoji font as data: enough of it, each once, the same every time, readable as a folder."""

import pickle
from pathlib import Path

import pytest
import torch
from PIL import Image

from sdtrain.data import emoji
from sdtrain.data.emoji import Emoji, find_fonts, main, write_folder
from sdtrain.data.images import Images
from sdtrain.errors import DataError, UserError

installed = pytest.mark.skipif(
    not find_fonts(), reason="no colour emoji font: apt-get install fonts-noto-color-emoji"
)


@pytest.fixture(scope="module")
def data():
    return Emoji()


@pytest.fixture
def few(monkeypatch):
    """200 code points are drawn in place of all."""
    codes = list(range(0x1F300, 0x1F3C8))
    monkeypatch.setattr("sdtrain.data.emoji.code_points", lambda: codes)
    return codes


@installed
def test_enough_and_each_once(data):
    train = data.split("train")
    validation = data.split("validation")
    captions = train.captions + validation.captions
    assert len(captions) == len(set(captions)) > 800
    assert 64 <= len(validation) <= 0.06 * len(captions)
    assert {"grinning face", "dog face", "red apple", "rocket"} <= set(captions)
    for part in ("regional indicator", "fitzpatrick", "digit", "tag ", "selector", "joiner"):
        assert not [caption for caption in captions if part in caption and "keycap" not in caption]
    pictures = {
        split[i, 0].image.numpy().tobytes()
        for split in (train, validation)
        for i in range(len(split))
    }
    assert len(pictures) > 0.99 * len(
        captions
    )  # distinct as drawn; at 32 pixels a few may fall together


@installed
def test_pictures_are_colourful_centred_squares_on_the_background(data):
    split = data.split("train")
    images = torch.stack([split[i, 0].image for i in range(len(split))])
    assert images.shape[1:] == (3, 32, 32)
    assert images.min() >= -1
    assert images.max() <= 1
    assert (images[:, :, 0, 0] == 1).all()  # white corner
    inked = (images < 0.9).any(1)
    assert inked.flatten(1).any(1).float().mean() > 0.99
    assert ((images.amax(1) - images.amin(1)).flatten(1).amax(1) > 0.3).float().mean() > 0.8
    for axis in (1, 2):
        along = inked.any(3 - axis)
        first = along.int().argmax(1)
        last = 31 - along.flip(1).int().argmax(1)
        centre = ((first + last) / 2)[along.any(1)]
        assert (centre - 15.5).abs().quantile(0.95) <= 1.5


@installed
def test_deterministic_and_blind_to_the_ordinal(few):
    data = Emoji()
    train = data.split("train")
    again = Emoji().split("train")
    assert len(train) > 100
    assert train.names == again.names
    assert all(torch.equal(train[i, 0].image, again[i, i].image) for i in range(0, len(train), 6))
    copy = pickle.loads(pickle.dumps(train))
    assert torch.equal(copy[3, 0].image, train[3, 0].image)
    assert len(data.example_prompts(8)) == 8
    assert set(data.example_prompts(8)) <= set(train.captions)


@installed
@pytest.mark.slow
def test_a_run_does_not_go_on_with_the_emoji_of_another_font(train_tiny, tmp_path, few):
    few[:] = range(0x1F600, 0x1F610)
    words = [
        "data=emoji",
        "model/autoencoder=pixels",
        "data.image_size=16",
        "trainer.max_images=16",
        "callbacks=none",
        "validation=none",
    ]
    run = tmp_path / "run"
    assert train_tiny(run, *words).code == 0
    assert train_tiny(run, *words, "resume=must").code == 0
    few.append(0x1F610)
    result = train_tiny(run, *words, "resume=must")
    assert result.code == 2
    assert "data.sha256: " in result.err
    assert "the emoji of data.font changed" in result.err


@installed
def test_options_are_seen(few):
    few[:] = range(0x1F300, 0x1F4A0)  # enough for another share
    data = Emoji()
    other = Emoji(
        image_size=200,  # larger than the font draws
        background=[0, 0, 255],
        seed=1,
        validation_fraction=0.2,
    )
    assert other.split("train")[0, 0].image.shape == (3, 200, 200)
    assert other.split("train")[0, 0].image[:, 0, 0].tolist() == [-1, -1, 1]
    assert len(other.split("validation")) == round(0.2 * len(other.code_points))
    assert not set(data.split("validation").names) <= set(other.split("validation").names)


@pytest.mark.slow
@installed
def test_folder_reads_back(few, tmp_path):
    data = Emoji()
    write_folder(data, tmp_path / "emoji")
    back = Images(path=str(tmp_path / "emoji"), crop="center", flip=False)
    for name in ("train", "validation"):
        assert back.split(name).names == data.split(name).names
        assert back.split(name).captions == data.split(name).captions
    difference = (back.split("train")[9, 0].image - data.split("train")[9, 0].image).abs()
    assert difference.mean() < 0.05  # bicubic there, Lanczos here
    with pytest.raises(UserError, match="not empty") as refused:
        write_folder(data, tmp_path / "emoji")
    assert refused.value.key == "FOLDER"


def test_no_font_on_the_machine(monkeypatch):
    monkeypatch.setattr(emoji, "FONT_PLACES", ("/nowhere",))
    monkeypatch.setenv("PATH", "/nowhere")  # nor fc-list
    with pytest.raises(
        DataError, match=r"data\.font.*apt-get install fonts-noto-color-emoji"
    ) as caught:
        Emoji()
    assert "\n" not in str(caught.value)


def plain_font():
    """A font without colours, which comes with matplotlib."""
    import matplotlib

    return Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")


@pytest.mark.parametrize(
    ("font", "words"),
    [
        (lambda: Path("/nowhere/font.ttf"), "/nowhere/font.ttf"),
        (lambda: Path(__file__), "cannot be opened as a font"),
        (plain_font, "no colour glyphs"),
    ],
)
def test_fonts_that_are_none(few, font, words):
    with pytest.raises(DataError, match=rf"data\.font=.*{words}.*apt-get install") as caught:
        Emoji(font=str(font()))
    assert "\n" not in str(caught.value)


def test_command_leaves_with_the_errors_code(tmp_path, capsys):
    assert main([str(tmp_path), "--font", "/nowhere/font.ttf"]) == 3
    assert capsys.readouterr().err.startswith("data.font=")


@installed
@pytest.mark.slow
def test_command_writes_the_folder(few, tmp_path, capsys):
    few.append(0x1F600)
    assert main([str(tmp_path), "--image-size", "24"]) == 0
    assert Image.open(tmp_path / "1f600.png").size == (24, 24)
    assert (tmp_path / "1f600.txt").read_text() == "grinning face\n"
    assert f"{len(list(tmp_path.glob('*.png')))} pictures" in capsys.readouterr().out
