"""The loaders: pictures in keyed order, collated with their draws."""

import math
import signal

import lightning.pytorch as L
import torch
from torch.utils.data import DataLoader, Dataset

from sdtrain.data.draws import Collate
from sdtrain.data.order import Stream
from sdtrain.data.skipped import Skipped
from sdtrain.errors import DataError, UserError
from sdtrain.types import Batch, PictureData, Pictures, Row

VALIDATION = (
    1 << 62
)  # ordinals from here on belong to validation pictures: no run of training gets that far


class Numbered(Dataset):
    """Hands each row on with its ordinal: (index, ordinal) -> (Row, ordinal)."""

    def __init__(self, pictures: Pictures) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Row, int]:
        return self.pictures[item], item[1]


class CollateBlock:
    """One rank's block of a micro-batch, collated. The block's place in the stream tells where the whole run stands after it."""

    def __init__(self, collate: Collate, rank: int, world: int) -> None:
        self.collate, self.rank, self.world = collate, rank, world

    def __call__(self, items: list[tuple[Row, int]]) -> Batch:
        rows, ordinals = [row for row, _ in items], [ordinal for _, ordinal in items]
        return self.collate(rows, ordinals, ordinals[0] + (self.world - self.rank) * len(items))


def deaf(worker: int) -> None:
    """Loader workers ignore SIGTERM and SIGINT: a signal to the whole group must not end them before the last checkpoint is written."""
    torch.set_num_threads(1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def micro_batch(batch_size: int, world: int, accumulate: int) -> int:
    """Pictures of one rank's micro-batch. Raises UserError where batch_size cannot be divided so."""
    size, rest = divmod(batch_size, world * accumulate)
    if rest or size == 0:
        raise UserError(
            f"data.batch_size={batch_size} is the global batch; it must be a multiple of trainer.devices x trainer.accumulate = "
            f"{world} x {accumulate}. Change data.batch_size."
        )
    return size


class DataModule(L.LightningDataModule):
    """Training micro-batches without end, and the validation pictures in order.

    Args:
        data: the data set.
        batch_size: pictures of one optimizer step, over all ranks and accumulated micro-batches.
        num_workers: loader processes per rank. They change nothing but speed.
        seed: of the order.
        collate: makes the batches; it holds the seed of the draws.
        accumulate: micro-batches of one optimizer step.
        skipped: where pictures that cannot be read may be replaced, what counts them.

    Raises DataError where batch_size is larger than the training split, UserError where it cannot be divided over ranks.
    """

    def __init__(
        self,
        *,
        data: PictureData,
        batch_size: int,
        num_workers: int,
        seed: int,
        collate: Collate,
        accumulate: int = 1,
        skipped: Skipped | None = None,
    ) -> None:
        super().__init__()
        self.data, self.batch_size, self.num_workers, self.seed, self.collate = (
            data,
            batch_size,
            num_workers,
            seed,
            collate,
        )
        self.accumulate, self.skipped, self.images_seen = accumulate, skipped, 0
        self.ends_at = math.inf  # images: set when the time is up
        self.train, self.validation = data.split("train"), data.split("validation")
        if batch_size > len(self.train):
            raise DataError(
                f"data.batch_size={batch_size} is larger than the training set of {len(self.train)} pictures. Lower it or add pictures."
            )

    def micro_batch(self, world: int) -> int:
        """Pictures of one rank's micro-batch."""
        return micro_batch(self.batch_size, world, self.accumulate)

    def train_dataloader(self) -> DataLoader:
        world, rank = (
            (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        )
        stream = Stream(
            length=len(self.train),
            seed=self.seed,
            start=self.images_seen,
            size=self.micro_batch(world),
            rank=rank,
            world=world,
        )
        return DataLoader(
            Numbered(self.train),
            batch_sampler=stream,
            collate_fn=CollateBlock(self.collate, rank, world),
            worker_init_fn=deaf,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def validation_batches(self, count: int, size: int = 64):
        """The first `count` validation pictures in batches of up to `size`, with draws keyed by picture."""
        count = min(count, len(self.validation))
        for start in range(0, count, size):
            places = range(start, min(start + size, count))
            batch = self.collate(
                [self.validation[(i, i)] for i in places],
                [VALIDATION + i for i in places],
                start + len(places),
            )
            self.note(batch, count=False)
            yield batch

    def note(self, batch: Batch, count: bool = True) -> None:
        """Takes in what was replaced in a batch; counted where it is one of training."""
        if self.skipped is not None:
            self.skipped.note(batch.skipped, count)

    def state_dict(self) -> dict:
        return {"images_seen": self.images_seen} | (
            {"skipped": self.skipped.state_dict()} if self.skipped is not None else {}
        )

    def load_state_dict(self, state: dict) -> None:
        self.images_seen = state["images_seen"]
        if self.skipped is not None and "skipped" in state:
            self.skipped.load_state_dict(state["skipped"])
