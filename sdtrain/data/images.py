"""A folder of captioned pictures.

The captions are parsed by `captions.py`, so that an error can name file and line, and then live in a `datasets.Dataset`: Arrow memory,
which forked loader workers share without copying it. datasets' own imagefolder drops pictures without a row silently.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NoReturn

from torch import Tensor

from sdtrain.data.captions import LAYOUTS, read_captions, some
from sdtrain.data.decode import (
    WHITE,
    PictureSplit,
    Transform,
    check_options,
    make_splits,
    open_picture,
    picture_size,
    resize_short_side,
    rows_hash,
)
from sdtrain.errors import DataError, UserError

# The last three are not read: listed, they are refused by name instead of being left out in silence.
SUFFIXES = (
    ".png",
    ".jpg",
    ".jpeg",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".ppm",
    ".jp2",
    ".avif",
    ".heic",
    ".heif",
    ".jxl",
)
CACHE_BYTES = 256 * 2**20


class FolderReader:
    """name -> uint8 [3, h, w], short side image_size. Keeps what it read, up to CACHE_BYTES in each process.

    Full, the cache takes nothing in and throws nothing out: epochs visit all pictures in turn, where the oldest entry is
    the one needed next.
    """

    def __init__(self, folder: str, image_size: int, background: Sequence[int]) -> None:
        self.folder, self.image_size, self.background = folder, image_size, tuple(background)
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
    """`data.path`: a folder of pictures with captions in metadata.jsonl or metadata.csv, or in a .txt beside each.

    Subfolders belong to it, links to folders and what begins with a dot do not. Every picture's header is read at
    construction, its pixels when they are asked for. DataError for what is wrong in the folder, UserError for an option.

    on_error: "fail" raises DataError for a bad picture. "skip" leaves those with a bad header out of the listing, with a line in `notes`,
    and gives another picture of the split for one whose pixels turn out broken later.
    max_skipped: how many different pictures may be left out or replaced. A count, because each is one that somebody could look at, whatever
    the size of the folder: a share of a large one would hide a disk that fails.
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
        for key, value, allowed in (
            ("missing_captions", missing_captions, ("error", "empty")),
            ("on_error", on_error, ("fail", "skip")),
        ):
            if value not in allowed:
                raise UserError(
                    f"data.{key}={value!r} is none of {', '.join(allowed)}. Change data.{key}."
                )
        if max_skipped < 0:
            raise UserError(
                f"data.max_skipped={max_skipped} must be at least 0. Change data.max_skipped."
            )
        training = Transform(image_size=image_size, crop=crop, flip=flip, seed=seed)
        self.image_size, self.notes = image_size, []
        folder = (
            os.path.abspath(os.path.expanduser(path)) if path else ""
        )  # "" would become the working directory
        rows = read_captions(folder, list_pictures(folder), missing_captions)
        names = sorted({name for name, _ in rows})
        good, bad = judge(folder, names, image_size)
        if bad and on_error == "fail":
            refuse(folder, bad, len(names), image_size)
        if bad:
            first = next(reason for reason, _ in bad.values())
            self.notes.append(
                f"data.on_error=skip: {len(bad)} of {len(names)} pictures are left out: {some(list(bad))}. The first: {first}"
            )
        if len(bad) > max_skipped:
            last, (reason, _) = list(bad.items())[-1]
            raise DataError(
                f"{len(bad)} of {len(names)} pictures in data.path={folder!r} cannot be used, and data.max_skipped={max_skipped} may be left out. "
                f"The last is {last}: {reason} Repair or remove them, or raise data.max_skipped."
            )
        if len(good) < 2:
            without = f" and {len(bad)} that cannot be used" if bad else ""
            raise DataError(
                f"data.path={path!r} holds {('no picture', 'one picture')[len(good)]}{without}; at least 2 are needed, one of them for validation. "
                f"Change data.path."
            )
        self.max_skipped = max_skipped - len(bad) if on_error == "skip" else None
        rows = [(name, caption) for name, caption in rows if name in good]
        self.sha256 = rows_hash((name, caption, good[name]) for name, caption in rows)
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
        """ "train" or "validation"."""
        return self._splits[name]

    def example_prompts(self, count: int) -> list[str]:
        """`count` training captions, spread evenly over the sorted files."""
        return self._splits["train"].spread(count)


def list_pictures(folder: str) -> list[str]:
    """Sorted relative names, with slashes, of the picture files in `folder` and below; what begins with a dot is left out."""
    if not os.path.isdir(folder):
        wrong = "is a file" if os.path.exists(folder) else "does not exist"
        raise DataError(
            f"data.path={folder!r} {wrong}; it must be a folder of pictures with captions ({LAYOUTS}). Change data.path."
        )

    def unreadable(error: OSError) -> None:
        raise DataError(
            f"data.path={folder!r}: {error.filename!r} cannot be listed: {error.strerror}. Change its permissions, or data.path."
        ) from error

    names = []
    for parent, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = Path(parent).relative_to(folder)
        names += [
            (inside / name).as_posix()
            for name in files
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
    if not names:
        raise DataError(
            f"data.path={folder!r} holds no pictures; they must end in {', '.join(SUFFIXES[:-3])}. Change data.path."
        )
    odd = [
        ascii(name) for name in sorted(names) if not name.isprintable()
    ]  # bytes that are no UTF-8, line breaks
    if odd:
        raise DataError(
            f"{len(odd)} file names in data.path={folder!r} are not printable text: {some(odd)}. Rename them, or change data.path."
        )
    return sorted(names)


def judge(
    folder: str, names: Sequence[str], image_size: int
) -> tuple[dict[str, str], dict[str, tuple[str, int | None]]]:
    """By their headers: ({name: mark} of the pictures that can be used, {name: (why not, its shorter side where that can be read)} of others)."""
    good, bad = {}, {}
    for name in names:
        path = os.path.join(folder, name)
        try:
            if not os.path.isfile(path):  # a pipe would be waited for
                raise DataError(f"The picture {path!r} is no file, or a link to none.")
            side, mark = min(picture_size(path)), file_mark(path)
        except DataError as error:
            bad[name] = str(error), None
        except OSError as error:  # it has vanished since
            bad[name] = f"The picture {path!r} cannot be opened: {error.strerror}.", None
        else:
            if side < image_size:
                bad[name] = (
                    f"The picture {path!r} is smaller than the crop: its shorter side is {side}, data.image_size={image_size}.",
                    side,
                )
            else:
                good[name] = mark
    return good, bad


def file_mark(path: str) -> str:
    """What tells a file from another in its place without reading all of it: its bytes, and a hash of the first and last 4096."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        ends = file.read(4096)
        file.seek(max(0, size - 4096))
        ends += file.read(4096)
    return f"{size} {hashlib.sha256(ends).hexdigest()}"


def refuse(
    folder: str, bad: dict[str, tuple[str, int | None]], count: int, image_size: int
) -> NoReturn:
    """One DataError for all of `count` pictures that cannot be opened, or else for all whose shorter side is below image_size."""
    broken = [name for name, (_, side) in bad.items() if side is None]
    if broken:
        raise DataError(
            f"{len(broken)} of {count} pictures in data.path={folder!r} cannot be read: {some(broken)}. "
            f"The first says: {bad[broken[0]][0]} Repair or remove them, change data.path, or leave them out with data.on_error=skip."
        )
    smallest = min(side for _, side in bad.values())
    raise DataError(
        f"{len(bad)} of {count} pictures in data.path={folder!r} are smaller than the crop, data.image_size={image_size}: "
        f"{some(list(bad))}. The shorter side must be at least data.image_size; the smallest seen is {smallest}. "
        f"Set data.image_size to {smallest} or less, remove them, or leave them out with data.on_error=skip."
    )
