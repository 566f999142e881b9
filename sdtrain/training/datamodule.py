"""The data loaders: pictures in keyed order, collated with the random numbers of their step."""

import os
import signal
from collections.abc import Iterator

import lightning.pytorch as L
import torch
from torch.utils.data import DataLoader, Dataset

from sdtrain.config.schema import micro_batch_size
from sdtrain.data.bucket_order import BucketStream
from sdtrain.data.buckets import buckets_of
from sdtrain.data.draws import Collate
from sdtrain.data.order import Stream
from sdtrain.data.prior import WithPrior
from sdtrain.data.skipped import Skipped
from sdtrain.errors import DataError
from sdtrain.training.input_watch import InputWatch, use_short_socket_folder
from sdtrain.training.progress import Progress
from sdtrain.types import Batch, PictureData, Pictures, Row, extras_of

VALIDATION = 1 << 62
"""First ordinal of validation pictures, larger than that of any training picture."""


class RowsWithOrdinals(Dataset):
    """Returns each row with its ordinal: (index, ordinal) -> (Row, ordinal)."""

    def __init__(self, pictures: Pictures) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Row, int]:
        return self.pictures[item], item[1]


class CollateBlock:
    """Collates one rank's block of a micro-batch, and computes from its position in the stream how
    many images the whole run has seen after it.
    """

    def __init__(self, collate: Collate, rank: int, world_size: int) -> None:
        self.collate = collate
        self.rank = rank
        self.world_size = world_size

    def __call__(self, items: list[tuple[Row, int]]) -> Batch:
        rows = []
        ordinals = []
        for row, ordinal in items:
            rows.append(row)
            ordinals.append(ordinal)
        stream_end = ordinals[0] + (self.world_size - self.rank) * len(items)
        return self.collate(rows, ordinals, stream_end)


def default_workers(ranks: int) -> int:
    """Return one loader process fewer than a rank has CPU cores, at least 1 and at most 4.

    ranks: that share the cores of this machine.
    """
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # only those that this process may use
        cores = len(os.sched_getaffinity(0))
    return max(1, min(4, cores // ranks - 1))


def set_up_worker(worker: int) -> None:
    """Make a loader worker ignore SIGTERM and SIGINT, and use one thread.

    A signal to the whole process group must not end the workers before the last checkpoint is
    written.
    """
    torch.set_num_threads(1)
    # Threads of the tokenizer do not survive the fork of a worker; unset, it prints a warning.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def check_batch(batch_size: int, train: Pictures, *, has_prior: bool = False) -> None:
    """Raise DataError if the batch is larger than the training split.

    has_prior: whether half of the batch comes from elsewhere, see `types.Prior`.
    """
    if has_prior and batch_size > 2 * len(train):
        raise DataError(
            f"is more than twice the {len(train)} training pictures, which are half of a batch "
            "with data.prior",
            key="data.batch_size",
            value=batch_size,
            remedy="Lower it or add pictures.",
        )
    if not has_prior and batch_size > len(train):
        raise DataError(
            f"is larger than the training set of {len(train)} pictures",
            key="data.batch_size",
            value=batch_size,
            remedy="Lower it or add pictures.",
        )


class WatchedLoader(DataLoader):
    """A loader that is watched while it loads each batch; not if `watch` is None."""

    watch: InputWatch | None = None

    def __iter__(self) -> Iterator[Batch]:
        if self.watch is None:
            return super().__iter__()
        return self.watch.watched(super().__iter__)


class DataModule(L.LightningDataModule):
    """An endless stream of training micro-batches, and the validation pictures in order.

    Args:
        data: the data set.
        num_workers: loader processes per rank; None for `default_workers`. They affect only speed.
        seed: seed of the order.
        collate: makes the batches; it holds the seed of their random numbers.
        progress: progress of the run; the stream begins at its images_seen.
        accumulate: micro-batches per optimizer step.
        skipped: counts pictures that cannot be read and are replaced; None if they may not be.
        watch: ends the run if no batch comes; None to wait without limit.

    Raises DataError if the batch is larger than the training split, UserError if it cannot be
    divided over the ranks.
    """

    def __init__(
        self,
        *,
        data: PictureData,
        num_workers: int | None,
        seed: int,
        collate: Collate,
        progress: Progress,
        accumulate: int = 1,
        skipped: Skipped | None = None,
        watch: InputWatch | None = None,
    ) -> None:
        super().__init__()
        self.data = data
        self.num_workers = num_workers
        self.seed = seed
        self.collate = collate
        self.progress = progress
        self.accumulate = accumulate
        self.skipped = skipped
        self.watch = watch
        self.train = data.split("train")
        self.validation = data.split("validation")
        self.prior = extras_of(data).prior
        check_batch(progress.batch_size, self.train, has_prior=self.prior is not None)

    def micro_batch(self, world_size: int) -> int:
        """Return the number of pictures in one rank's micro-batch."""
        return micro_batch_size(self.progress.batch_size, world_size, self.accumulate)

    def train_dataloader(self) -> DataLoader:
        world_size = self.trainer.world_size if self.trainer else 1
        rank = self.trainer.global_rank if self.trainer else 0
        num_workers = self.num_workers
        if num_workers is None:
            num_workers = default_workers(self.trainer.num_devices if self.trainer else 1)
        if num_workers:
            use_short_socket_folder()
        pictures = self.train if self.prior is None else WithPrior(self.train, self.prior)
        loader = WatchedLoader(
            RowsWithOrdinals(pictures),
            batch_sampler=self.stream(rank, world_size),
            collate_fn=CollateBlock(self.collate, rank, world_size),
            worker_init_fn=set_up_worker,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
        loader.watch = self.watch
        return loader

    def stream(self, rank: int, world_size: int) -> Stream | BucketStream:
        """Return the micro-batches of a rank, as (index, ordinal), from the images seen on."""
        shared = {
            "seed": self.seed,
            "start": self.progress.images_seen,
            "size": self.micro_batch(world_size),
            "rank": rank,
            "world": world_size,
            "weights": getattr(self.train, "weights", None),
        }
        buckets = buckets_of(self.train)
        if buckets is None:
            visits = None
            if self.prior is not None:
                visits = WithPrior(self.train, self.prior).visits_of_prior(self.seed)
            return Stream(length=len(self.train), prior=visits, **shared)
        return BucketStream(buckets=buckets, batch_size=self.progress.batch_size, **shared)

    def validation_batches(self, count: int, size: int = 64) -> Iterator[Batch]:
        """Yield the first `count` validation pictures in batches of up to `size`, with random
        numbers keyed by picture.
        """
        count = min(count, len(self.validation))
        for start in range(0, count, size):
            indices = range(start, min(start + size, count))
            rows = [self.validation[(index, index)] for index in indices]
            ordinals = [VALIDATION + index for index in indices]
            batch = self.collate(rows, ordinals, start + len(indices))
            self.record_skipped(batch, count=False)
            yield batch

    def record_skipped(self, batch: Batch, count: bool = True) -> None:
        """Record the pictures that were replaced in a batch.

        count: whether to count the replacements, as for a training batch.
        """
        if self.skipped is not None:
            self.skipped.note(batch.skipped, count)

    def state_dict(self) -> dict:
        state = {"images_seen": self.progress.images_seen}
        if self.skipped is not None:
            state["skipped"] = self.skipped.state_dict()
        return state

    def load_state_dict(self, state: dict) -> None:
        self.progress.images_seen = state["images_seen"]
        if self.skipped is not None and "skipped" in state:
            self.skipped.load_state_dict(state["skipped"])
