"""The same latents from a folder, Parquet, Arrow and tar; and for pictures of several shapes."""

import os
import shutil

import pyarrow.parquet as pq
import pytest
import torch
from stored_pictures import FORMATS, image_table, rows, write_folder, write_tar

from sdtrain.data import folder_state
from sdtrain.data.columns import Columns
from sdtrain.data.dataset import StoredPictures
from sdtrain.data.reader import ChangedFileError


def moments(data) -> dict[int, torch.Tensor]:
    """Of all training pictures, by index."""
    split = data.split("train")
    return {index: split[index, index].moments for index in range(len(split))}


def test_each_format_has_the_latents_of_the_folder(images_of, cached, counting, tmp_path):
    """They are encoded once, since the files of the pictures are the same."""
    made = rows()
    folder = write_folder(tmp_path / "folder", made)
    expected = moments(cached(images_of(folder, flip=False), counting).data)
    encoded = len(counting.seen)
    assert encoded > 0
    for name, write in FORMATS.items():
        path = str(write(tmp_path / name, made))
        data = StoredPictures(path=path, columns=Columns(), image_size=16)
        for _ in range(2):  # the second time without reading the pictures
            found = moments(cached(data, counting).data)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[index], expected[index]) for index in found), name
    assert len(counting.seen) == encoded


def test_pictures_of_several_shapes(images_of, paint, pictures, cached, autoencoder):
    for number in range(12, 24):
        paint(pictures / f"{number}.png", number, size=(16, 28))
        (pictures / f"{number}.txt").write_text(f"caption {number}")
    data = images_of(pictures, buckets=True, bucket_step=4, batch_size=2)
    plain = data.split("train")
    made = cached(data).data.split("train")
    shapes = set()
    for ordinal in range(60):
        row = plain[ordinal % len(plain), ordinal]
        found = made[ordinal % len(plain), ordinal].moments
        shapes.add(found.shape)
        torch.testing.assert_close(found, autoencoder.moments(row.image[None])[0])
    assert len(shapes) == 2


def test_two_columns_of_pictures_have_latents_of_their_own(cached, autoencoder, tmp_path):
    made = rows(6)
    others = [row | {"bytes": made[i - 3]["bytes"]} for i, row in enumerate(made)]
    table = image_table(made)
    table = table.append_column("other", image_table(others).column("image"))
    pq.write_table(table, tmp_path / "a.parquet")
    for column in ("image", "other"):
        columns = Columns(image=column)
        data = StoredPictures(path=str(tmp_path / "a.parquet"), columns=columns, image_size=16)
        split = data.split("train")
        for index, found in moments(cached(data).data).items():
            expected = autoencoder.moments(split[index, 0].image[None])[0]
            torch.testing.assert_close(found, expected)


def test_a_file_that_is_replaced_before_it_is_cached(cached, autoencoder, tmp_path):
    """Nothing of it is cached under the stamp of the other one."""
    made = rows(6)
    place = write_tar(tmp_path / "tar", made)
    data = StoredPictures(path=str(place), image_size=16)
    shutil.rmtree(place)
    write_tar(place, [row | {"text": f"new {row['text']}"} for row in made[::-1]])
    with pytest.raises(ChangedFileError):
        cached(data)
    data = StoredPictures(path=str(place), image_size=16)
    split = data.split("train")
    for index, found in moments(cached(data).data).items():
        expected = autoencoder.moments(split[index, 0].image[None])[0]
        torch.testing.assert_close(found, expected)


def test_a_picture_or_caption_that_changed_in_a_large_folder(
    images_of, paint, pictures, cached, monkeypatch
):
    """It is noticed before the cache is read, although no picture is opened any more."""
    monkeypatch.setattr(folder_state, "FEW_FILES", 0)
    os.utime(pictures, (10**9, 10**9))
    cached(images_of(pictures))
    for few in (0, 1000):  # as for many pictures, and for few
        monkeypatch.setattr("sdtrain.data.listed_folder.FEW", few)
        cached(images_of(pictures))
        for file in (pictures / "03.png", pictures / "03.txt"):
            status = file.stat()
            os.utime(file, (1, 1))
            with pytest.raises(ChangedFileError) as caught:
                cached(images_of(pictures))
            assert (caught.value.key, caught.value.exit_code) == ("data.refresh", 3)
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
