"""The one way in which sdtrain writes a file or a folder: beside its place, flushed to the disk,
then renamed.

A reader never sees half a file, whatever happens to the writer. What a dead writer leaves behind is
a hidden name that ends in .tmp, see `remove_left_overs`.
"""

import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sdtrain.errors import StorageError

OLD = ".old.tmp"
"""Ends the name of a folder while another takes its place."""


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a path to write to, and moves what was written there to `path`. Raises OSError; then
    `path` is as it was.
    """
    beside = _beside(path)
    try:
        yield beside
        _fsync(beside)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """The same for a folder of files, which replaces one that is there. Raises OSError; then
    `folder` is as it was, or the new one where only the last flush of its place failed.

    Every file gets the mode that the process gives a new file: safetensors makes its own readable
    to their owner alone.
    """
    beside = _beside(folder)
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        mode = _mode_of_new_files(beside)
        yield beside
        for file in beside.iterdir():
            if stat.S_IMODE(file.stat().st_mode) != mode:
                file.chmod(mode)
            _fsync(file)
        _fsync(beside)
        _replace_folder(beside, folder)
        _fsync(folder.parent)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8, or raises OSError. Bytes of a file name that are no text are
    escaped, as JSON has it.
    """
    with atomic_file(path) as beside:
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")


def missing_folders(folder: Path) -> list[Path]:
    """The folder and those around it that are not there yet, the innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


@contextmanager
def removed_if_empty(folders: Iterable[Path]) -> Iterator[None]:
    """Removes the folders afterwards, one after the other, where nothing has been written into
    them.
    """
    try:
        yield
    finally:
        with suppress(OSError):
            for folder in folders:
                folder.rmdir()


def restore_replaced(folder: Path) -> None:
    """Gives the folders in `folder` their names back that a writer had renamed when it died, before
    the new one was in place.
    """
    for old in folder.glob(f".*{OLD}"):
        replaced = old.with_name(old.name.removeprefix(".").removesuffix(OLD))
        if not replaced.exists():
            old.rename(replaced)


def remove_left_overs(folder: Path) -> None:
    """Removes what writers that died have left in `folder`, but no folder that they were about to
    replace: see `restore_replaced`.
    """
    restore_replaced(folder)
    for path in folder.glob(".*.tmp"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def check_writable(folder: Path, key: str = "output") -> Path:
    """Makes the folder where it is not there, and tries a file in it. Returns the folder.

    Raises StorageError, which names `key`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = _beside(folder / "probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StorageError(
            f"cannot be written: {error.strerror}",
            key=key,
            value=str(folder),
            remedy=f"Give another folder in {key}.",
        ) from error
    return folder


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _mode_of_new_files(folder: Path) -> int:
    """By the umask, or by what else the folder has to say; os.umask cannot be asked without being
    set, for all threads.
    """
    probe = _beside(folder / "probe")
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    return mode


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace_folder(new: Path, folder: Path) -> None:
    """A folder cannot be renamed onto one that holds files: the old one is renamed first, and gets
    its name back where the new one cannot take it. Raises OSError; then `folder` is as it was.
    """
    if not folder.exists():
        new.rename(folder)
        return
    old = folder.with_name(f".{folder.name}{OLD}")
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
