"""A cache holds what the autoencoder makes of each picture; only what is missing is computed."""

import io
import json
import os
import resource
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from rich.console import Console

from sdtrain.data.shapes import Shapes
from sdtrain.errors import DataError, StorageError, UserError
from sdtrain.precompute.store import Store
from sdtrain.training.callbacks.noise_level_validation import content_hash

ORDINALS = range(40)
SIDE_OF_PICTURES = 16


def visits(split):
    """Rows of a split at many visits, some of which are mirrored."""
    return [split[ordinal % len(split), ordinal] for ordinal in ORDINALS]


def shards(folder: Path) -> list[Path]:
    return sorted((folder / "cache" / "latents").glob("*.safetensors"))


def flip_a_value(path: Path) -> None:
    """Change one bit of the first value of a shard."""
    content = bytearray(path.read_bytes())
    header = int.from_bytes(content[:8], "little")
    content[8 + header] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("flip", [True, False])
def test_rows_bring_the_moments_of_the_pictures_that_they_replace(
    images_of, pictures, cached, autoencoder, flip
):
    data = images_of(pictures, flip=flip)
    made = cached(data).data
    for name in ("train", "validation"):
        plain = visits(data.split(name))
        for row, with_moments in zip(plain, visits(made.split(name)), strict=True):
            assert with_moments.image is None
            assert (with_moments.caption, with_moments.label) == (row.caption, row.label)
            assert content_hash(with_moments) == content_hash(row)
            expected = autoencoder.moments(row.image[None])[0]
            torch.testing.assert_close(with_moments.moments, expected)
    assert made.sha256 == data.sha256
    assert made.example_prompts(3) == data.example_prompts(3)


def test_draws_have_the_mean_and_the_deviation_of_the_posterior(
    images_of, pictures, cached, autoencoder
):
    """Over many visits of one picture: within five standard errors."""
    from sdtrain.data.draws import Collate
    from sdtrain.diffusion.noise import Gaussian

    data = images_of(pictures, flip=False)
    made = cached(data).data
    shape = autoencoder.latent_shape(SIDE_OF_PICTURES)
    collate = Collate(
        seed=0,
        latent_shape=shape,
        posterior=True,
        stratified=False,
        global_batch=1,
        noise=Gaussian(),
    )
    count = 2000
    rows = [made.split("train")[0, ordinal] for ordinal in range(count)]
    batch = collate(rows, list(range(count)), count)
    latents = autoencoder.latents_of(batch.moments, batch.posterior) / autoencoder.latent_scale
    image = data.split("train")[0, 0].image
    mean, std = autoencoder.moments(image[None])[0]
    error = (latents.mean(0) - mean) / (std / count**0.5)
    assert error.abs().max() < 5
    error = (latents.std(0) / std - 1) * (2 * count) ** 0.5
    assert error.abs().max() < 5


def test_only_what_is_missing_is_encoded(images_of, paint, pictures, cached, counting):
    """Nothing the second time; then a changed picture, an added one, one whose content is known."""

    def encoded() -> int:
        counting.seen.clear()
        made = cached(images_of(pictures, flip=False), counting)
        assert all(row.moments is not None for row in visits(made.data.split("train")))
        return len(counting.seen)

    assert encoded() == 12
    assert encoded() == 0
    paint(pictures / "03.png", 103)
    assert encoded() == 1
    paint(pictures / "20.png", 20)
    (pictures / "20.txt").write_text("added")
    assert encoded() == 1
    shutil.copyfile(pictures / "20.png", pictures / "21.png")
    (pictures / "21.txt").write_text("the same picture once more")
    assert encoded() == 0
    shutil.rmtree(pictures.parent / "cache" / "latents")
    assert encoded() == 13


def test_files_are_hashed_again_only_if_they_changed(
    images_of, paint, pictures, cached, monkeypatch
):
    from sdtrain.data.reader import PictureReader

    read = Counter()
    read_bytes = PictureReader.read_bytes

    def counted(self, name):
        read[name] += 1
        return read_bytes(self, name)

    monkeypatch.setattr(PictureReader, "read_bytes", counted)
    cached(images_of(pictures))
    assert set(read.values()) == {1} and len(read) == 12
    os.utime(pictures / "05.png")
    cached(images_of(pictures))
    assert read["05.png"] == 2 and sum(read.values()) == 13
    (pictures.parent / "cache" / "contents.sqlite").write_bytes(b"no database")
    cached(images_of(pictures))
    assert sum(read.values()) == 25


def test_latents_that_exist_keep_their_bits(images_of, pictures, cached, autoencoder):
    """Where the twins are added later, by an autoencoder that rounds otherwise."""

    class Rounding(torch.nn.Module):
        def moments(self, images):
            return autoencoder.moments(images) * (1 + 1e-5)

    def plain(data) -> list[torch.Tensor]:
        split = data.split("train")
        return [split._moments_of(index, False)[0] for index in range(len(split))]

    before = plain(cached(images_of(pictures, flip=False)).data)
    for _ in range(2):
        after = plain(cached(images_of(pictures, flip=True), Rounding()).data)
        assert all(map(torch.equal, before, after))


def test_pictures_that_only_have_to_be_hashed_need_no_space(
    images_of, paint, pictures, cached, counting, tmp_path, monkeypatch, capsys
):
    """A complete cache is taken as it is when the hashes are lost, with a warning, as pictures may
    turn out to be missing; a new picture needs room."""
    cached(images_of(pictures))
    (tmp_path / "cache" / "contents.sqlite").unlink()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    assert "up to 12 of 12" in cached(images_of(pictures), counting).printed
    assert "data.cache" in capsys.readouterr().err
    assert not counting.seen
    shutil.rmtree(tmp_path / "cache" / "latents")
    with pytest.raises(StorageError) as caught:
        cached(images_of(pictures))
    assert caught.value.key == "data.cache"


def test_a_folder_whose_path_is_not_utf_8(images_of, pictures, cached, counting, tmp_path):
    folder = pictures.rename(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    cached(images_of(folder), counting)
    encoded = len(counting.seen)
    assert encoded > 0
    printed = cached(images_of(folder), counting).printed
    assert "all 12 pictures" in printed and len(counting.seen) == encoded


def test_what_is_encoded_alone_has_the_bits_of_what_was_encoded_with_others(
    images_of, pictures, cached, tmp_path
):
    data = images_of(pictures)
    straight = [row.moments for row in visits(cached(data).data.split("train"))]
    (tmp_path / "cache").rename(tmp_path / "first")
    for name in ("07", "02"):
        for file in pictures.glob(f"{name}.*"):
            file.rename(tmp_path / file.name)
    cached(images_of(pictures))
    for name in ("07", "02"):
        for file in tmp_path.glob(f"{name}.*"):
            file.rename(pictures / file.name)
    again = [row.moments for row in visits(cached(data).data.split("train"))]
    assert all(map(torch.equal, straight, again))


def test_half_precision_rounds_and_says_by_how_much(images_of, pictures, cached, tmp_path):
    data = images_of(pictures)
    exact = visits(cached(data).data.split("train"))
    (tmp_path / "cache").rename(tmp_path / "first")
    made = cached(data, dtype="fp16")
    for row, rounded in zip(exact, visits(made.data.split("train")), strict=True):
        assert torch.equal(rounded.moments, row.moments.half().float())
    assert "cache.dtype=fp16" in made.printed


def test_a_cache_of_another_autoencoder_or_dtype_is_refused(images_of, pictures, cached):
    data = images_of(pictures)
    cached(data)
    for changes, key in (
        ({"autoencoder": {"autoencoder": "0" * 64}}, "data.cache"),
        ({"dtype": "fp16"}, "cache.dtype"),
    ):
        with pytest.raises(StorageError) as caught:
            cached(data, **changes)
        assert caught.value.key == key


def test_of_two_autoencoders_at_once_the_second_is_refused(
    images_of, pictures, cached, counting, monkeypatch, tmp_path
):
    """Both saw an empty folder; and when identity.json is lost afterwards, or is no object."""
    data = images_of(pictures)
    other = {"autoencoder": {"autoencoder": "0" * 64}}
    begin = Store.open_for_writing

    def second(store):
        with monkeypatch.context() as patch:
            patch.setattr(Store, "open_for_writing", begin)
            cached(data)
        begin(store)

    identity = tmp_path / "cache" / "latents" / "identity.json"
    with monkeypatch.context() as patch:
        patch.setattr(Store, "open_for_writing", second)
        with pytest.raises(StorageError) as caught:
            cached(data, counting, **other)
    assert caught.value.key == "data.cache"
    assert json.loads(identity.read_text())["autoencoder"] != "0" * 64
    for content in ("5", "[1]", "{", None):
        identity.unlink() if content is None else identity.write_text(content)
        with pytest.raises(StorageError) as caught:
            cached(data, counting, **other)
        assert caught.value.key == "data.cache", content
    assert len(shards(tmp_path)) == 1 and not counting.seen
    cached(data, counting)  # its own is completed
    assert not counting.seen


def test_a_damaged_shard_ends_a_run_and_is_mended_by_the_command(
    images_of, pictures, cached, counting, tmp_path
):
    data = images_of(pictures, flip=False)
    cached(data)
    (path,) = shards(tmp_path)
    flip_a_value(path)
    split = cached(data, counting).data.split("train")
    with pytest.raises(StorageError) as caught:
        visits(split)
    assert caught.value.key == "data.cache"
    assert not counting.seen
    split = cached(data, counting, is_checked_whole=True).data.split("train")
    assert len(counting.seen) == 12
    assert len(visits(split)) == len(ORDINALS)


def test_a_shard_cut_short_is_computed_again(images_of, pictures, cached, counting, tmp_path):
    data = images_of(pictures, flip=False)
    cached(data)
    (path,) = shards(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    visits(cached(data, counting).data.split("train"))
    assert len(counting.seen) == 12


def test_what_has_no_cached_form_is_refused(images_of, pictures, cached):
    read_otherwise = images_of(pictures)
    for name in ("train", "validation"):
        read_otherwise.split(name).reader = lambda name, size=None: torch.zeros(3, 16, 16)
    for data, key in (
        (images_of(pictures, crop="random"), "data.crop"),
        (Shapes(size=8), "data.cache"),
        (read_otherwise, "data.cache"),
    ):
        with pytest.raises(UserError) as caught:
            cached(data)
        assert caught.value.key == key
    with pytest.raises(UserError) as caught:
        cached(images_of(pictures), torch.nn.Identity())  # has no moments
    assert caught.value.key == "data.cache"


def test_a_full_disk_and_a_folder_that_cannot_be_written(
    images_of, pictures, cached, tmp_path, monkeypatch
):
    data = images_of(pictures)
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
        with pytest.raises(StorageError) as caught:
            cached(data)
    assert caught.value.key == "data.cache"
    assert not (tmp_path / "cache").exists()  # told before anything is written
    (tmp_path / "file").write_text("no folder")
    for folder in (tmp_path / "file", tmp_path / "file" / "cache"):
        printed = io.StringIO()
        with pytest.raises(StorageError) as caught:
            cached(data, folder=str(folder), console=Console(file=printed))
        assert (caught.value.key, printed.getvalue()) == ("data.cache", "")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))  # what a full disk looks like
    try:
        with pytest.raises(StorageError) as caught:
            cached(data)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.key == "data.cache"
    assert not shards(tmp_path)


def test_a_broken_picture_is_replaced_as_without_a_cache(images_of, pictures, cached):
    content = (pictures / "04.png").read_bytes()
    (pictures / "04.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError):
        cached(images_of(pictures))
    data = images_of(pictures, on_error="skip")
    made = cached(data).data
    plain = visits(data.split("train"))
    assert any(row.skipped for row in plain)
    for row, with_moments in zip(plain, visits(made.split("train")), strict=True):
        assert (with_moments.caption, with_moments.skipped) == (row.caption, row.skipped)
        assert content_hash(with_moments) == content_hash(row)


def test_size_and_time_are_told_before(images_of, pictures, cached, tmp_path):
    """9 training pictures with twins and 3 others, each of two maps of 4 x 4 x 4 numbers."""
    bytes_each = 2 * 64 * 4

    def announced(flip: bool) -> float:
        printed = cached(images_of(pictures, flip=flip)).printed
        assert "about" in printed and str(tmp_path / "cache" / "latents") in printed
        (number,) = [word for word in printed.replace("(", "").split() if word.startswith("0.0")]
        return float(number) * 1e6

    assert announced(flip=True) == pytest.approx(21 * bytes_each, rel=0.01)
    assert sum(path.stat().st_size for path in shards(tmp_path)) > 21 * bytes_each
    shutil.rmtree(tmp_path / "cache" / "latents")
    assert announced(flip=False) == pytest.approx(12 * bytes_each, rel=0.01)
    assert announced(flip=True) == pytest.approx(9 * bytes_each, rel=0.01)


def test_the_identity_is_written_and_readable(images_of, pictures, cached, autoencoder, tmp_path):
    cached(images_of(pictures))
    found = json.loads((tmp_path / "cache" / "latents" / "identity.json").read_text())
    assert found == {"autoencoder": autoencoder.sha256, "dtype": "fp32"}
