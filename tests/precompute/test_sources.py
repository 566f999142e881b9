"""The same latents from a folder, Parquet, Arrow and tar; and for pictures of several shapes."""

import torch
from stored_pictures import FORMATS, rows, write_folder

from sdtrain.data.columns import Columns
from sdtrain.data.dataset import StoredPictures


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
