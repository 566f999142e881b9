"""Types that several rooms share, as plain dataclasses and protocols.

Those that Lightning moves to a device are not frozen, because it rebuilds them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

PictureSize = int | tuple[int, int]
"""The side of a square picture, or (height, width), in pixels."""


@dataclass
class Row:
    """One sample of a data set: a picture, or in its place the autoencoder's moments of it.

    Attributes:
        image: [3, H, W] float32 in [-1, 1]; None if there are moments.
        caption: "" if there is none.
        label: in [0, num_classes); 0 if the data have no classes.
        depth: [1, H, W] float32, inverse depth, 1 nearest and 0 farthest; or None.
        moments: [2, C, h, w] float32, mean and standard deviation of the autoencoder's posterior,
            before the latent scale; or None.
        pixels_sha256: hash of the picture's bytes [3, H, W], if there are moments in its place.
        context: [L, D] float32, what a frozen text encoder makes of the caption; or None.
        loss_weight: of this sample in the mean of the losses.
        skipped: (name, problem) of each unreadable picture that this one replaces.
    """

    image: Tensor | None
    caption: str
    label: int = 0
    depth: Tensor | None = None
    moments: Tensor | None = None
    pixels_sha256: bytes | None = None
    context: Tensor | None = None
    loss_weight: float = 1.0
    skipped: tuple[tuple[str, str], ...] = ()


def rows_by_size(rows: Sequence[Row]) -> list[list[Row]]:
    """Return the rows in groups whose pictures, or moments, have one size and can be stacked."""
    groups: dict[torch.Size, list[Row]] = {}
    for row in rows:
        tensor = row.image if row.moments is None else row.moments
        groups.setdefault(tensor.shape, []).append(row)
    return list(groups.values())


@dataclass
class Batch:
    """One micro-batch with every random number that the training step needs.

    Attributes:
        image: [B, 3, H, W] in [-1, 1]; None if there are moments.
        caption: B strings.
        label: [B] int64.
        depth: [B, 1, H, W] or None.
        noise: [B, C, h, w], the shape of the latents; what the network learns to predict.
        input_noise: the same shape; what is added to the latents. None: `noise` itself.
        posterior: the same shape; standard normal noise for a draw from the autoencoder's
            posterior, or None.
        u: [B] float64 uniforms from which the times t are made.
        drop: [B] float64 uniforms for caption dropout.
        mask: [B, 1, H, W] float32, 1 where a model that inpaints draws anew; or None.
        channel_drop: [B, N] float64 uniforms for the dropout of the model's N channel conditions,
            in their order; None for N = 0.
        ordinal: [B] int64.
        stream_end: the ordinal that the whole run, over all ranks, has reached after this
            micro-batch.
        network_seed: seeds what a network draws itself during training, such as dropout.
        moments: [B, 2, C, h, w] in place of the pictures, see Row; or None.
        tokens: [B, L] int64 of the captions, with empty ones in place of those that are dropped; or
            None.
        context: [B, L, D] of the captions, see Row, with that of the empty one in place of those
            that are dropped; or None.
        loss_weight: [B] float32, by which the losses are multiplied; None: all by 1.
        skipped: (name, problem) of each unreadable picture that was replaced by another one.
    """

    image: Tensor | None
    caption: list[str]
    label: Tensor
    depth: Tensor | None
    noise: Tensor
    input_noise: Tensor | None
    posterior: Tensor | None
    u: Tensor
    drop: Tensor
    ordinal: Tensor
    stream_end: int
    network_seed: int = 0
    moments: Tensor | None = None
    tokens: Tensor | None = None
    context: Tensor | None = None
    mask: Tensor | None = None
    channel_drop: Tensor | None = None
    loss_weight: Tensor | None = None
    skipped: tuple[tuple[str, str], ...] = ()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """Return the batch with its tensors on a device."""
        moved = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                moved[field.name] = value.to(device, non_blocking=non_blocking)
        return replace(self, **moved)


@dataclass
class Losses:
    """The losses of one batch.

    Attributes:
        per_sample: [B], the weighted loss of each sample. Its mean is the training loss.
        t: [B], the time of each sample.
    """

    per_sample: Tensor
    t: Tensor


class Pictures(Protocol):
    """One split of a data set.

    An item is chosen by (index, ordinal): the index of the picture, and the ordinal that keys its
    random crop and flip. A split may have an attribute `captions`, see `captions_of`.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, item: tuple[int, int]) -> Row: ...


class PictureData(Protocol):
    """A data set: pictures of image_size x image_size with captions.

    It has the splits "train" and "validation". It may have further attributes, see `DataExtras`.
    """

    image_size: int
    num_classes: int

    def split(self, name: str) -> Pictures:
        """Return the pictures of a split."""
        ...

    def example_prompts(self, count: int) -> list[str]:
        """Return `count` captions to sample if the user gives no prompt; the same at every call."""
        ...


@dataclass(frozen=True)
class Classes:
    """The classes of a data set.

    Attributes:
        count: labels are in [0, count); 1 if there are no classes.
        names: of the classes, by label; empty if they have no names.
        why_none: why there are no classes.
        sha256: hash of the listing with its labels. It takes the place of the listing's own hash if
            a model reads the labels.
        untrained: the labels whose pictures are all held out for validation.
    """

    count: int = 1
    names: tuple[str, ...] = ()
    why_none: str = ""
    sha256: str | None = None
    untrained: tuple[int, ...] = ()


class Memo(Protocol):
    """Remembers values about the rows of a data set from one start to the next."""

    def get(self, key: str) -> Any:
        """Return the value with this key, or None."""
        ...

    def put(self, key: str, value: Any) -> None:
        """Remember a value fit for json."""
        ...


@dataclass(frozen=True)
class Prior:
    """Pictures of the class of a subject, which a model should keep drawing as before (Ruiz et al.
    2023, "DreamBooth", section 3.3). Every second sample is one of them.

    data: the pictures. weight: of their losses, beside 1 for the others.
    """

    data: PictureData
    weight: float


@dataclass(frozen=True)
class DataExtras:
    """Optional attributes of a data set, beyond those of PictureData, under the same names.

    Attributes:
        notes: lines to print before the run; by default none.
        max_skipped: how many more unreadable pictures may be replaced by others during training,
            see Row.skipped. None, the default: none are replaced or counted.
        sha256: hash of the listing of its pictures, by which a resumed run recognises them. None,
            the default: the configuration alone identifies the data.
        classes: what its labels mean. None, the default: only num_classes is known.
        memo: remembers values about its rows. None, the default: they are worked out at each start.
        prior: pictures to train in turn with its own. None, the default: there are none.
    """

    notes: tuple[str, ...] = ()
    max_skipped: int | None = None
    sha256: str | None = None
    classes: Classes | None = None
    memo: Memo | None = None
    prior: Prior | None = None


def extras_of(data: PictureData) -> DataExtras:
    """Return the optional attributes of a data set. Nothing else reads them."""
    return DataExtras(
        notes=tuple(getattr(data, "notes", ())),
        max_skipped=getattr(data, "max_skipped", None),
        sha256=getattr(data, "sha256", None),
        classes=getattr(data, "classes", None),
        memo=getattr(data, "memo", None),
        prior=getattr(data, "prior", None),
    )


def captions_of(split: Pictures) -> Sequence[str]:
    """Return all captions of a split, by index.

    Empty if the split has no attribute `captions`, because its data are generated on demand.
    """
    return getattr(split, "captions", None) or ()
