"""What the headers of a folder's pictures say: which can be used, and why the others cannot."""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field

from sdtrain.data.decode import PIXEL_LIMIT, picture_header
from sdtrain.data.listing import some
from sdtrain.errors import DataError


@dataclass
class Unusable:
    """Why a picture cannot be used.

    shorter_side: in pixels, where it is that; else None. The rest is known then: mark: its
    `file_mark`. pixels_scaled_up: how many it would have as large as the crop. has_frames: whether
    it holds several.
    """

    reason: str
    shorter_side: int | None = None
    mark: str = ""
    pixels_scaled_up: float = 0
    has_frames: bool = False


@dataclass
class Headers:
    """What the headers of a folder's pictures say.

    marks: {name: its `file_mark`} of those that can be used. unusable: the others, by name. frames,
    scaled_up: names of those that hold several frames, and that are smaller than the crop.
    """

    marks: dict[str, str] = field(default_factory=dict)
    unusable: dict[str, Unusable] = field(default_factory=dict)
    frames: list[str] = field(default_factory=list)
    scaled_up: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many pictures there are."""
        return len(self.marks) + len(self.unusable)

    def take_in_small(self) -> None:
        """Those that are smaller than the crop can be used: they are scaled up. Unless they are so
        long and thin that they would be too large for the memory.
        """
        for name, why in list(self.unusable.items()):
            if why.shorter_side is None:
                continue
            if why.pixels_scaled_up > PIXEL_LIMIT:
                reason = f"{why.reason} Scaled up it would have more than {PIXEL_LIMIT} pixels."
                self.unusable[name] = Unusable(reason)
                continue
            del self.unusable[name]
            self.marks[name] = why.mark
            self.scaled_up.append(name)
            if why.has_frames:
                self.frames.append(name)


def classify_headers(folder: str, names: Iterable[str], image_size: int) -> Headers:
    """Reads the header of every picture: which can be used, and why the others cannot."""
    headers = Headers()
    for name in sorted(names):
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
                scaled_up = image_size**2 * max(header.size) / side
                headers.unusable[name] = Unusable(
                    reason, side, mark, pixels_scaled_up=scaled_up, has_frames=header.has_frames
                )
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


def refuse_unusable(folder: str, headers: Headers, image_size: int) -> None:
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
            remedy=f"Set data.image_size to {smallest} or less, scale them up with "
            "data.upscale=true, remove them, or leave them out with data.on_error=skip.",
        )


def check_counts(path: str, folder: str, headers: Headers, max_skipped: int) -> None:
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
