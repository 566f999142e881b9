"""Find a stored data set: a folder, files, or a repository of the Hugging Face hub."""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from sdtrain.data.arrow_folder import MARKERS, ArrowFolder, is_arrow_folder
from sdtrain.data.decode import picture_suffixes
from sdtrain.data.listing import shortened, suffix_of
from sdtrain.data.parquet_files import ParquetFiles
from sdtrain.data.stored import Store
from sdtrain.data.tar_files import TarFiles
from sdtrain.errors import DataError, first_line
from sdtrain.paths import HUB_ID

PARQUET = (".parquet",)
TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
"""Endings of tar files. The compressed ones are listed, so that an error names them."""

ALLOWED = (
    "Parquet files, WebDataset tar files, a folder of such files, a folder that datasets has "
    "written with save_to_disk, or an id of the Hugging Face hub (OWNER/NAME)"
)
DEFAULT_IMAGE = "image"
"""Column of the pictures in Arrow and Parquet data."""


def open_store(
    path: str,
    *,
    split: str | None,
    image: str | None,
    revision: str | None = None,
    other: str | None = None,
) -> Store:
    """Open the data set at a path, and read what is stored beside its pictures.

    Args:
        path: what data.path allows, see ALLOWED; files may be named by a pattern.
        split: of the data set; None takes `train`, or everything if no file is named by a split.
        image: the column of the pictures, of tar files their suffix; None for the default.
        revision: of a repository of the hub: a branch, tag or commit; None for `main`.
        other: a column of other pictures, such as depth maps, or None; of tar files their suffix.

    Raises DataError if there is no such data set or it cannot be read, and for a revision of what
    is not on the hub.
    """
    found = os.path.abspath(os.path.expanduser(path)) if path else ""
    is_local = os.path.exists(found) or glob.has_magic(path) or not HUB_ID.fullmatch(path)
    if is_local and revision is not None:
        raise DataError(
            f"has no effect: data.path={path} is no repository of the Hugging Face hub",
            key="data.revision",
            value=revision,
            remedy="Remove it, or set data.revision=null.",
        )
    if os.path.isdir(found) and is_arrow_folder(found):
        return ArrowFolder(found, image or DEFAULT_IMAGE, split)
    if os.path.isdir(found):
        files = _files_in(found)
    elif os.path.exists(found):
        files = [found]
    elif glob.has_magic(path):
        files = sorted(filter(os.path.isfile, glob.glob(found, recursive=True)))
    elif is_local:
        raise _path_error(path, "does not exist")
    else:
        found = _download(path, revision)
        files = _files_in(found)
    kept = [file for file in files if _has_ending(file, PARQUET + TAR)]
    if not kept:
        raise _nothing_readable(path, files)
    if len({_has_ending(file, PARQUET) for file in kept}) > 1:
        raise _path_error(path, "holds both Parquet and tar files; only one kind can be read")
    chosen, notes = _files_of_split(kept, found, split)
    if _has_ending(chosen[0], PARQUET):
        store = ParquetFiles(chosen, image or DEFAULT_IMAGE)
    else:
        store = TarFiles(chosen, image, other)
    store.notes = [*notes, *store.notes]
    return store


def _has_ending(file: str, endings: Sequence[str]) -> bool:
    return file.lower().endswith(tuple(endings))


def _files_in(folder: str) -> list[str]:
    """Return the sorted paths of all files in a folder and its subfolders, hidden ones left out.

    Raises DataError if one of the folders cannot be listed.
    """

    def raise_unreadable(error: OSError) -> None:
        problem = f"has a folder {error.filename!r} that cannot be listed: {error.strerror}"
        raise _path_error(folder, problem) from error

    files = []
    for parent, folders, names in os.walk(folder, onerror=raise_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [os.path.join(parent, name) for name in names if not name.startswith(".")]
    return sorted(files)


def _files_of_split(
    files: list[str], folder: str, split: str | None
) -> tuple[list[str], list[str]]:
    """Return the files of a split, and lines for the user about those of others.

    A file belongs to a split if it is a word of its name, or of a folder below `folder`, as in
    data/train-00000-of-00001.parquet or test/0000.parquet. Raises DataError if none does.
    """
    above = folder if os.path.isdir(folder) else os.path.dirname(folder)
    names = [os.path.relpath(file, above) for file in files]
    pattern = re.compile(rf"(^|[/._-]){re.escape(split or 'train')}([/._-]|$)")
    chosen = []
    for file, name in zip(files, names, strict=True):
        if pattern.search(name.replace(os.sep, "/")):
            chosen.append(file)
    if len(chosen) == len(files) or split is None and not chosen:
        return files, []
    if not chosen:
        raise DataError(
            f"none of the files in {folder!r} is named so; they are {shortened(names)}",
            key="data.split",
            value=split,
            remedy="Set data.split to a word of their names.",
        )
    others = len(files) - len(chosen)
    return chosen, [f"data.split={split or 'train'}: {others} files of other splits are not read."]


def _download(repository: str, revision: str | None) -> str:
    """Return the folder with the Parquet files of a repository of the hub at a revision.

    They are downloaded unless they are cached. Raises DataError if they cannot be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = snapshot_download(
            repository, repo_type="dataset", revision=revision, allow_patterns=["*.parquet"]
        )
    except RevisionNotFoundError as error:
        raise DataError(
            f"is no branch, tag or commit of {repository}",
            key="data.revision",
            value=revision,
            remedy="Change data.revision, or set data.revision=null for the branch main.",
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        at_revision = f" at data.revision={revision}" if revision else ""
        raise _path_error(
            repository,
            f"does not exist here, and cannot be read from the Hugging Face hub{at_revision}: "
            f"{first_line(error)}",
        ) from error
    if not _files_in(folder):
        raise _path_error(repository, "is a repository of the hub without Parquet files")
    return folder


def _nothing_readable(path: str, files: Sequence[str]) -> DataError:
    if any(suffix_of(file) in picture_suffixes() for file in files):
        return DataError(
            "holds pictures as files",
            key="data.path",
            value=path,
            remedy="Set data=images to read a folder of pictures.",
        )
    if any(suffix_of(file) == ".arrow" for file in files):
        return _path_error(path, f"holds Arrow files, but neither {' nor '.join(MARKERS)}")
    seen = f"only {shortened([Path(file).name for file in files])}" if files else "no files"
    return _path_error(path, f"holds {seen}")


def _path_error(path: str, problem: str) -> DataError:
    return DataError(
        f"{problem.rstrip('.')}; it must be {ALLOWED}",
        key="data.path",
        value=path,
        remedy="Change data.path.",
    )
