"""A folder of captioned pictures.

The captions are parsed by `captions.py`, so that an error can name file and line, and then live in
a `datasets.Dataset`: Arrow memory, which forked loader workers share without copying it. datasets'
own imagefolder drops pictures without a row silently.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from sdtrain.data.captions import LAYOUTS, Captioned, read_captions
from sdtrain.data.crop import Transform, resize_short_side
from sdtrain.data.decode import WHITE, open_picture, picture_header
from sdtrain.data.listing import Listing, list_folder, some
from sdtrain.data.split import PictureSplit, bad_option, check_options, make_splits, rows_hash
from sdtrain.errors import DataError

CACHE_BYTES = 256 * 2**20


class FolderReader:
    """name -> uint8 [3, h, w], short side image_size.

    Keeps what it read, up to CACHE_BYTES in each process. Full, the cache takes nothing in and
    throws nothing out: epochs visit all pictures in turn, where the oldest entry is the one needed
    next.
    """

    def __init__(self, folder: str, image_size: int, background: Sequence[int]) -> None:
        self.folder = folder
        self.image_size = image_size
        self.background = tuple(background)
        self._cache: dict[str, Tensor] = {}
        self._free = CACHE_BYTES

    def __call__(self, name: str) -> Tensor:
        if name in self._cache:
            return self._cache[name]
        picture = open_picture(os.path.join(self.folder, name), background=self.background)
        pixels = resize_short_side(picture, self.image_size)
        if pixels.nbytes <= self._free:
            self._cache[name] = pixels
            self._free -= pixels.nbytes
        return pixels

    def __reduce__(self):
        return FolderReader, (self.folder, self.image_size, self.background)


class Images:
    """A folder of pictures with captions.

    These are in metadata.jsonl or metadata.csv, or in a .txt beside each picture. Subfolders belong
    to it, and folders that links lead to; what begins with a dot does not. Every picture's header
    is read at construction, its pixels when they are asked for. DataError for what is wrong in the
    folder, UserError for an option.

    Args:
        path: the folder.
        image_size: side of the squares in pixels.
        crop: where a square is cut from a picture for training.
        flip: whether half of the training pictures are mirrored.
        validation_fraction: share of the pictures that is held out, see `hold_out_count`.
        missing_captions: "empty" trains a picture without a caption with the empty one.
        on_error: "fail" raises DataError for a bad picture. "skip" leaves those with a bad header
            out of the listing, with a line in `notes`, and gives another picture of the split for
            one whose pixels turn out broken later.
        max_skipped: how many different pictures may be left out or replaced. A count, because each
            is one that somebody could look at, whatever the size of the folder: a share of a large
            one would hide a disk that fails.
        background: (red, green, blue) in 0..255 behind transparent pixels.
        seed: of crops, flips, replacements and of what is held out.
    """

    num_classes = 1

    def __init__(
        self,
        *,
        path: str,
        image_size: int = 32,
        crop: Literal["random", "center"] = "random",
        flip: bool = True,
        validation_fraction: float = 0.05,
        missing_captions: Literal["error", "empty"] = "error",
        on_error: Literal["fail", "skip"] = "fail",
        max_skipped: int = 100,
        background: Sequence[int] = WHITE,
        seed: int = 0,
    ) -> None:
        check_options(
            image_size=image_size, validation_fraction=validation_fraction, background=background
        )
        if missing_captions not in ("error", "empty"):
            raise bad_option("missing_captions", missing_captions, "is none of error, empty")
        if on_error not in ("fail", "skip"):
            raise bad_option("on_error", on_error, "is none of fail, skip")
        if max_skipped < 0:
            raise bad_option("max_skipped", max_skipped, "must be at least 0")
        training = Transform(image_size=image_size, crop=crop, flip=flip, seed=seed)
        self.image_size = image_size
        # "" would become the working directory.
        folder = os.path.abspath(os.path.expanduser(path)) if path else ""
        listing = list_pictures(folder)
        captioned = read_captions(folder, listing, missing_captions)
        headers = classify_headers(folder, sorted({name for name, _ in captioned.rows}), image_size)
        if on_error == "fail":
            _refuse_unusable(folder, headers, image_size)
        _check_counts(path, folder, headers, max_skipped)
        self.notes = _notes(folder, listing, captioned, headers)
        self.max_skipped = max_skipped - len(headers.unusable) if on_error == "skip" else None
        rows = [(name, caption) for name, caption in captioned.rows if name in headers.marks]
        self.sha256 = rows_hash((name, caption, headers.marks[name]) for name, caption in rows)
        self._splits = make_splits(
            names=[name for name, _ in rows],
            captions=[caption for _, caption in rows],
            read=FolderReader(folder, image_size, background),
            fraction=validation_fraction,
            training=training,
            seed=seed,
            max_skipped=self.max_skipped,
        )

    def split(self, name: str) -> PictureSplit:
        """The pictures of "train" or "validation"."""
        return self._splits[name]

    def example_prompts(self, count: int) -> list[str]:
        """`count` training captions, spread evenly over the sorted files."""
        return self._splits["train"].spread(count)


def list_pictures(folder: str) -> Listing:
    """What lies in the folder. DataError where that is no picture."""
    if not os.path.isdir(folder):
        wrong = "is a file" if os.path.exists(folder) else "does not exist"
        raise DataError(
            f"{wrong}; it must be a folder of pictures with captions ({LAYOUTS})",
            key="data.path",
            value=folder,
            remedy="Change data.path.",
        )
    listing = list_folder(folder)
    if not listing.names:
        held = listing.left_out(())
        raise DataError(
            f"holds no pictures{f', but {held}' if held else ''}; they must end in .png, .jpg, "
            ".webp or another suffix of a picture that Pillow opens",
            key="data.path",
            value=folder,
            remedy="Change data.path.",
        )
    return listing


@dataclass
class Unusable:
    """Why a picture cannot be used. shorter_side: in pixels, where it is that; else None."""

    reason: str
    shorter_side: int | None = None


@dataclass
class Headers:
    """What the headers of a folder's pictures say.

    marks: {name: its `file_mark`} of those that can be used. unusable: the others, by name. frames:
    names of those that hold several frames.
    """

    marks: dict[str, str] = field(default_factory=dict)
    unusable: dict[str, Unusable] = field(default_factory=dict)
    frames: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many pictures there are."""
        return len(self.marks) + len(self.unusable)


def classify_headers(folder: str, names: Sequence[str], image_size: int) -> Headers:
    """Reads the header of every picture: which can be used, and why the others cannot."""
    headers = Headers()
    for name in names:
        path = os.path.join(folder, name)
        try:
            if not os.path.isfile(path):  # a pipe would be waited for
                problem = f"The picture {path!r} is no file, or a link to none"
                raise DataError(problem, key="data.path")
            header = picture_header(path)
            side = min(header.size)
            mark = file_mark(path)
        except DataError as error:
            headers.unusable[name] = Unusable(str(error))
        except OSError as error:  # it has vanished since
            reason = f"The picture {path!r} cannot be opened: {error.strerror}."
            headers.unusable[name] = Unusable(reason)
        else:
            if side < image_size:
                reason = (
                    f"The picture {path!r} is smaller than the crop: its shorter side is {side}, "
                    f"data.image_size={image_size}."
                )
                headers.unusable[name] = Unusable(reason, side)
            else:
                headers.marks[name] = mark
                if header.has_frames:
                    headers.frames.append(name)
    return headers


def file_mark(path: str) -> str:
    """What tells a file from another in its place without reading all of it.

    Its number of bytes, and a hash of the first and last 4096.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        ends = file.read(4096)
        file.seek(max(0, size - 4096))
        ends += file.read(4096)
    return f"{size} {hashlib.sha256(ends).hexdigest()}"


def _refuse_unusable(folder: str, headers: Headers, image_size: int) -> None:
    """Raises one DataError for all pictures that cannot be opened, or else for all too small."""
    unusable = headers.unusable
    broken = [name for name, why in unusable.items() if why.shorter_side is None]
    if broken:
        raise DataError(
            f"{len(broken)} of {headers.count} pictures in data.path={folder} cannot be read: "
            f"{some(broken)}. The first says: {unusable[broken[0]].reason}",
            key="data.path",
            remedy="Repair or remove them, change data.path, or leave them out with "
            "data.on_error=skip.",
        )
    if unusable:
        smallest = min(why.shorter_side for why in unusable.values())
        raise DataError(
            f"{len(unusable)} of {headers.count} pictures in data.path={folder} are smaller than "
            f"the crop, data.image_size={image_size}: {some(list(unusable))}. The shorter side "
            f"must be at least data.image_size; the smallest seen is {smallest}",
            key="data.image_size",
            remedy=f"Set data.image_size to {smallest} or less, remove them, or leave them out "
            "with data.on_error=skip.",
        )


def _check_counts(path: str, folder: str, headers: Headers, max_skipped: int) -> None:
    """Raises DataError for too many pictures that are left out, or too few that are not."""
    unusable = headers.unusable
    if len(unusable) > max_skipped:
        last, why = list(unusable.items())[-1]
        raise DataError(
            f"{len(unusable)} of {headers.count} pictures in data.path={folder} cannot be used, "
            f"and data.max_skipped={max_skipped} may be left out. The last is {last}: {why.reason}",
            key="data.max_skipped",
            remedy="Repair or remove them, or raise data.max_skipped.",
        )
    if len(headers.marks) < 2:
        held = ("no picture", "one picture")[len(headers.marks)]
        without = f" and {len(unusable)} that cannot be used" if unusable else ""
        raise DataError(
            f"holds {held}{without}; at least 2 are needed, one of them for validation",
            key="data.path",
            value=path,
            remedy="Change data.path.",
        )


def _notes(folder: str, listing: Listing, captioned: Captioned, headers: Headers) -> list[str]:
    """Lines about all that is left out, or is not read as it stands there."""
    notes = []
    unusable = headers.unusable
    if unusable:
        first = next(iter(unusable.values()))
        notes.append(
            f"data.on_error=skip: {len(unusable)} of {headers.count} pictures are left out: "
            f"{some(list(unusable))}. The first: {first.reason}"
        )
    read = headers.marks.keys() | unusable.keys() | captioned.sources
    left_out = listing.left_out(read)
    if left_out:
        notes.append(f"data.path={folder}: left out are {left_out}.")
    if headers.frames:
        notes.append(
            f"Of {len(headers.frames)} pictures with several frames the first is read: "
            f"{some(headers.frames)}."
        )
    return notes + captioned.notes
