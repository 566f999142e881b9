"""The scale of the latents is checked on fewer pictures if they are large."""

from types import SimpleNamespace

import pytest
import torch

from sdtrain.training.parts import calibration_latents


@pytest.mark.parametrize(
    ("side", "pictures", "batches"),
    [
        (32, 1000, [64]),
        (64, 1000, [64]),
        (128, 1000, [16]),
        (256, 1000, [4, 4]),
        (512, 1000, [1] * 8),
        (32, 5, [5]),
        (512, 3, [1] * 3),
    ],
)
def test_batches_have_as_many_pixels_and_no_picture_twice(side, pictures, batches):
    class Train:
        def __len__(self) -> int:
            return pictures

        def __getitem__(self, place: tuple[int, int]) -> int:
            return place[0]

    encoded = []

    def latents_of_rows(rows: list[int]) -> torch.Tensor:
        encoded.append(rows)
        return torch.tensor(rows)

    data = SimpleNamespace(image_size=side, split=lambda name: Train())
    latents = calibration_latents(SimpleNamespace(latents_of_rows=latents_of_rows), data)
    assert [len(rows) for rows in encoded] == batches
    assert latents.tolist() == list(range(sum(batches)))
