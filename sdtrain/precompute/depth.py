"""Make the depth maps of a data set's pictures with a depth model."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console

from sdtrain.data.depth import EstimatedDepth, map_file
from sdtrain.data.reader import ChangedFileError, PictureReader
from sdtrain.data.split import PictureSplit
from sdtrain.errors import DataError, StorageError, UserError
from sdtrain.files import atomic_file
from sdtrain.models.depth_estimator import DepthEstimator
from sdtrain.precompute.claims import Claims
from sdtrain.precompute.contents import Contents
from sdtrain.precompute.progress import progress_bar
from sdtrain.precompute.sharing import Batch, SharedWork
from sdtrain.types import PictureData, extras_of

KEY = "data.depth_model"
SPLITS = ("train", "validation")

RECORD = "depth_maps.sqlite"
"""File in the folder of the depth maps that says what they were made of."""

NO_STAMP = (-1, -1)
"""The size and time of no file: that of a depth map that is being written."""

CLAIMS = "claims.lock"
"""File that is written before any other, and so marks a folder as one of sdtrain."""

PICTURES_IN_BATCH = 16
"""How many pictures a process claims at a time."""


@dataclass
class DepthMaps:
    """The depth maps of a data set in a folder.

    A map is made again if the file of its picture has another size or time than when it was made,
    or if it was made of other pictures or by other weights.

    folder: of the maps. identity: hash of the source of the pictures and of the depth model.
    reader: of the pictures. record: the identity with which each map was made. skips: whether a
    picture that cannot be read has no depth map, and is no error. unreadable: names of such
    pictures.
    """

    folder: str
    identity: bytes
    reader: PictureReader
    record: Contents
    skips: bool
    unreadable: set[str] = field(default_factory=set)

    def missing_in(self, batch: Batch) -> list[str]:
        """Return the names of a batch whose depth maps have to be made."""
        made = self.record.known(self.reader.source.stamps(batch.items))
        missing = []
        for name in batch.items:
            is_made = made.get(name) == self.identity and map_file(self.folder, name).is_file()
            if not is_made and name not in self.unreadable:
                missing.append(name)
        return missing

    def make(self, names: Sequence[str], estimator: DepthEstimator) -> None:
        """Make depth maps. Raises DataError for a picture that cannot be read, StorageError."""
        made = {}
        # Whoever is stopped while he replaces an older map leaves no record of it.
        self.record.add(dict.fromkeys(names, (NO_STAMP, b"")))
        # Before they are read: a picture that changes meanwhile is then read again.
        stamps = self.reader.source.stamps(names)
        for name in names:
            try:
                picture = self.reader.picture(name)
            except ChangedFileError:
                raise
            except DataError:
                if not self.skips:
                    raise
                self.unreadable.add(name)
                continue
            self._write(name, estimator, picture)
            if name in stamps:
                made[name] = (stamps[name], self.identity)
        self.record.add(made)

    def _write(self, name: str, estimator: DepthEstimator, picture: Image.Image) -> None:
        path = map_file(self.folder, name)
        depth = estimator(picture)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as temporary:
                depth.save(temporary, "PNG")
        except OSError as error:
            raise _not_writable(self.folder, error) from error


def make_depth_maps(
    data: PictureData,
    device: torch.device,
    console: Console,
    check_signals: Callable[[], None],
) -> None:
    """Make the depth maps that a data set with data.depth_model lacks; do nothing for another one.

    Several processes share the work. Raises UserError for a model that cannot be read, DataError
    for a picture that cannot, StorageError for a folder that cannot be written.

    Args:
        data: the data set.
        device: of the depth model.
        console: where a line and a bar are printed.
        check_signals: called after each batch; raises to stop.
    """
    split = data.split("train")
    depth_of = split.depth_of if isinstance(split, PictureSplit) else None
    if not isinstance(depth_of, EstimatedDepth):
        return
    folder = Path(depth_of.path)
    _check_folder(folder, depth_of.model)
    estimator = DepthEstimator(depth_of.model, KEY, device)
    made_of = (split.reader.source.identity, split.reader.background, estimator.identity)
    maps = DepthMaps(
        folder=str(folder),
        identity=hashlib.sha256(repr(made_of).encode(errors="surrogateescape")).digest(),
        reader=split.reader,
        record=Contents(folder / RECORD, "depth maps", key="data.depth"),
        skips=extras_of(data).max_skipped is not None,
    )
    names = sorted({name for each in SPLITS for name in data.split(each).names})
    missing = set(maps.missing_in(Batch("", names)))
    if not missing:
        console.print(f"Depth: all {len(names):,} depth maps are in {folder}.", soft_wrap=True)
        return
    incomplete = [batch for batch in _batches(names) if not missing.isdisjoint(batch.items)]
    line = f"Depth: {len(missing):,} of {len(names):,} depth maps are made now in {folder}"
    console.print(line, soft_wrap=True)
    with _claims(folder) as claims, progress_bar(console, len(missing), "maps", "depth") as bar:
        work = SharedWork(claims, incomplete, maps.missing_in)
        while work.is_left:
            while batch := work.claim_next():
                maps.make(batch.items, estimator)
                work.note_computed(batch.name)
                work.release_computed()
                bar.advance(len(batch.items))
                check_signals()
            work.wait_for_others(bar.wait(check_signals))


def _check_folder(folder: Path, model: str) -> None:
    """Raise UserError for a folder with files that sdtrain has not made."""
    if folder.exists() and not (folder / CLAIMS).exists() and any(folder.iterdir()):
        raise UserError(
            f"would replace files in data.depth={folder}, which it has not made",
            key=KEY,
            value=model,
            remedy="Remove data.depth_model to read them, or set data.depth to a folder that is "
            "empty or does not exist.",
        )


@contextmanager
def _claims(folder: Path) -> Iterator[Claims]:
    """Return the claims on the work in a folder, which is made. Raises StorageError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        claims = Claims(folder / CLAIMS)
    except OSError as error:
        raise _not_writable(str(folder), error) from error
    try:
        yield claims
    finally:
        claims.close()


def _batches(names: list[str]) -> Iterator[Batch]:
    for start in range(0, len(names), PICTURES_IN_BATCH):
        part = names[start : start + PICTURES_IN_BATCH]
        yield Batch("\n".join(part), part)


def _not_writable(folder: str, error: OSError) -> StorageError:
    return StorageError(
        f"The depth maps cannot be written to {folder}: {error.strerror}",
        key="data.depth",
        remedy="Free space, or set data.depth to another folder.",
    )
