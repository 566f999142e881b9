"""The loaders: validation has draws of its own, the same at every validation."""

import pytest
import torch

from sdtrain.data.draws import Collate
from sdtrain.data.shapes import Shapes
from sdtrain.diffusion.noise import Gaussian
from sdtrain.errors import DataError
from sdtrain.training.datamodule import DataModule, default_workers
from sdtrain.training.progress import Progress


def datamodule(batch_size: int = 8, size: int = 64) -> DataModule:
    collate = Collate(
        seed=0,
        latent_shape=(4, 2, 2),
        posterior=False,
        stratified=False,
        global_batch=batch_size,
        noise=Gaussian(),
    )
    return DataModule(
        data=Shapes(size=size, validation_size=16),
        num_workers=0,
        seed=0,
        collate=collate,
        progress=Progress(batch_size, max_images=10_000),
    )


def test_loaders_leave_a_core_to_each_rank(monkeypatch):
    expected = {(1, 1): 1, (2, 1): 1, (4, 1): 3, (64, 1): 4, (8, 2): 3, (8, 8): 1}
    for (cores, ranks), workers in expected.items():
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert default_workers(ranks) == workers, (cores, ranks)


def test_validation_shares_no_draw_with_training():
    data = datamodule()
    (validation,) = data.validation_batches(8)
    stream = iter(data.train_dataloader())
    training = [next(stream) for _ in range(8)]
    seen = torch.cat([batch.ordinal for batch in training])
    assert not set(validation.ordinal.tolist()) & set(seen.tolist())
    for batch in training:
        for name in ("noise", "u", "drop"):
            ours = getattr(validation, name).flatten().tolist()
            assert not set(ours) & set(getattr(batch, name).flatten().tolist()), name


def test_validation_is_the_same_each_time_and_in_batches_of_any_size():
    data = datamodule()
    (whole,) = data.validation_batches(8)
    parts = list(data.validation_batches(8, size=3))
    assert [len(part.caption) for part in parts] == [3, 3, 2]
    assert torch.equal(torch.cat([part.noise for part in parts]), whole.noise)
    assert torch.equal(torch.cat([part.u for part in parts]), whole.u)
    assert len(next(data.validation_batches(1000)).caption) == 16  # no more than there are


def test_the_stream_begins_at_the_images_seen():
    data = datamodule()
    straight = iter(data.train_dataloader())
    batches = [next(straight) for _ in range(3)]
    later = datamodule()
    later.load_state_dict({"images_seen": 16})
    resumed = next(iter(later.train_dataloader()))
    assert torch.equal(resumed.ordinal, batches[2].ordinal)
    assert torch.equal(resumed.image, batches[2].image)
    assert torch.equal(resumed.noise, batches[2].noise)


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(DataError) as refused:
        datamodule(batch_size=128, size=64)
    assert refused.value.key == "data.batch_size"
