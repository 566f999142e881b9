"""What travels between the rooms, as plain dataclasses.

They are not frozen, because Lightning rebuilds them when it moves them to a device.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
from torch import Tensor


@dataclass
class Row:
    """One sample of a data set: a picture, or in its place the autoencoder's moments of it.

    Attributes:
        image: [3, H, W] float32 in [-1, 1], or None where there are moments. caption: "" where it
        has none. label: in [0, num_classes), 0 where the data have no classes. depth: [1, H, W]
        float32, inverse depth: 1 nearest, 0 farthest, or None. moments: [2, C, h, w] float32: mean
        and standard deviation of the autoencoder's posterior, before the latent scale, or None.
        skipped: (name, what is wrong with it) of each picture in whose place this one stands.
    """

    image: Tensor | None
    caption: str
    label: int = 0
    depth: Tensor | None = None
    moments: Tensor | None = None
    skipped: tuple[tuple[str, str], ...] = ()


@dataclass
class Batch:
    """One micro-batch with every random number that the training step needs.

    Attributes:
        image: [B, 3, H, W] in [-1, 1], or None where there are moments. caption: B strings. label:
        [B] int64. depth: [B, 1, H, W] or None. noise: [B, C, h, w], of the latents' shape: what the
        network is to predict. input_noise: of the same shape: what is added to the latents, None
        where that is `noise`. posterior: of the same shape: standard normal for the autoencoder's
        posterior, or None. u: [B] float64 uniforms behind t. drop: [B] float64 uniforms behind
        caption dropout. ordinal: [B] int64. stream_end: the ordinal at which the whole run, over
        all ranks, stands after this micro-batch. network_seed: of what a network draws by
        itself while it trains, such as dropout. moments: [B, 2, C, h, w] in the place of the
        picture, see Row, or None. skipped: (name, what is wrong with it) of each picture that
        another one was taken for.
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
    skipped: tuple[tuple[str, str], ...] = ()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The batch with its tensors on a device."""
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
        per_sample: [B], the weighted loss of each sample; its mean is the training loss.
        t: [B], the times they were taken at.
    """

    per_sample: Tensor
    t: Tensor


class Pictures(Protocol):
    """One split of a data set.

    An item is (index, ordinal): which picture, and the ordinal that keys its crop and flip. It may
    have `captions`, see `captions_of`.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, item: tuple[int, int]) -> Row: ...


class PictureData(Protocol):
    """A data set: pictures of image_size x image_size with captions.

    It has the splits "train" and "validation". It may have more attributes, see `DataExtras`.
    """

    image_size: int
    num_classes: int

    def split(self, name: str) -> Pictures:
        """The pictures of a split."""
        ...

    def example_prompts(self, count: int) -> list[str]:
        """`count` captions that are drawn where the user names none; the same at every call."""
        ...


@dataclass(frozen=True)
class Classes:
    """The classes of a data set.

    Attributes:
        count: labels are in [0, count); 1 where there are no classes. names: what they are called,
        by label; empty where they are numbers. why_none: why there are none. sha256: of the listing
        with its labels, in the place of the listing's own where a model reads them. untrained: the
        labels of which all pictures are held out.
    """

    count: int = 1
    names: tuple[str, ...] = ()
    why_none: str = ""
    sha256: str | None = None
    untrained: tuple[int, ...] = ()


@dataclass(frozen=True)
class DataExtras:
    """What a data set may have beside what PictureData asks for, under the same names.

    Attributes:
        notes: lines that are printed before the run. Absent: none.
        max_skipped: how many different pictures may yet be replaced by others while training, see
            Row.skipped. Absent or None: none is, and none is counted.
        sha256: of the listing of its pictures, by which a run that goes on recognises them. Absent
            or None: its configuration alone says what they are.
        classes: what its labels mean. Absent or None: its num_classes is all that is known.
    """

    notes: tuple[str, ...] = ()
    max_skipped: int | None = None
    sha256: str | None = None
    classes: Classes | None = None


def extras_of(data: PictureData) -> DataExtras:
    """The only place that asks a data set for them."""
    return DataExtras(
        notes=tuple(getattr(data, "notes", ())),
        max_skipped=getattr(data, "max_skipped", None),
        sha256=getattr(data, "sha256", None),
        classes=getattr(data, "classes", None),
    )


def captions_of(split: Pictures) -> Sequence[str]:
    """All captions of a split by index, empty where it has no `captions`: of data that are drawn
    when they are asked for.
    """
    return getattr(split, "captions", None) or ()
