"""A cache holds what the autoencoder makes of each picture; only what is missing is computed."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from sdtrain.data.shapes import Shapes
from sdtrain.errors import DataError, StorageError, UserError
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
    for data, key in (
        (images_of(pictures, crop="random"), "data.crop"),
        (Shapes(size=8), "data.cache"),
    ):
        with pytest.raises(UserError) as caught:
            cached(data)
        assert caught.value.key == key


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
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(StorageError) as caught:
        cached(data)
    assert caught.value.key == "data.cache"


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
    printed = cached(images_of(pictures, flip=True)).printed
    stored = sum(path.stat().st_size for path in shards(tmp_path))
    (number,) = [word for word in printed.replace("(", "").split() if word.startswith("0.0")]
    # 9 training pictures with twins and 3 others, each of two maps of 4 x 4 x 4 numbers.
    assert float(number) == pytest.approx(21 * 2 * 64 * 4 / 1e6, rel=0.01)
    assert stored > 21 * 2 * 64 * 4
    assert "about" in printed and str(tmp_path / "cache" / "latents") in printed


def test_the_identity_is_written_and_readable(images_of, pictures, cached, autoencoder, tmp_path):
    cached(images_of(pictures))
    found = json.loads((tmp_path / "cache" / "latents" / "identity.json").read_text())
    assert found == {"autoencoder": autoencoder.sha256, "dtype": "fp32"}
