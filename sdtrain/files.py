"""How sdtrain writes every file and folder: under a temporary name, flushed to the disk, renamed.

Readers therefore never see an incomplete file, whatever happens to the writer. A writer that dies
leaves a hidden name that ends in .tmp: see `remove_leftovers`.
"""

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sdtrain.errors import StorageError

ONLY_OWNER = 0o600
"""Mode of a file that only its owner may read and write."""

NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a hard link fails with where the file system has none."""

REPLACED_SUFFIX = ".old.tmp"
"""Suffix of the temporary name of a folder while a new one takes its place."""


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, and rename it to `path` afterwards.

    Raises OSError; then `path` is unchanged. The file gets the mode of newly created files.
    """
    temporary = _temporary_path(path)
    try:
        yield temporary
        _set_mode(temporary)
        _fsync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder to write files to, and rename it to `folder` afterwards, which it
    replaces.

    Raises OSError; then `folder` is unchanged, or already the new one if only the last flush, that
    of its parent, failed. Every file gets the mode of newly created files: safetensors makes its
    own readable only to their owner.
    """
    temporary = _temporary_path(folder)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        set_modes(temporary)
        flush_files(temporary)
        _replace_folder(temporary, folder)
        _fsync(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def set_modes(folder: Path) -> None:
    """Give every file below the folder the mode of newly created files. Raises OSError."""
    for file in folder.rglob("*"):
        if file.is_file():
            _set_mode(file)


def flush_files(folder: Path) -> None:
    """Flush everything below the folder, and the folder, to the disk. Raises OSError."""
    for path in folder.rglob("*"):
        _fsync(path)
    _fsync(folder)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, atomically. Raises OSError.

    What UTF-8 cannot encode, such as undecodable bytes of a file name, is escaped as in JSON.
    """
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_new_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, atomically, unless there is one. Raises OSError.

    Of several processes that do so at once, the first one wins: on a file system without hard
    links the last one.
    """
    if path.exists():
        return
    temporary = _temporary_path(path)
    write_text(temporary, text)
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, as hex."""
    with open(path, "rb") as file:
        if hasattr(hashlib, "file_digest"):
            return hashlib.file_digest(file, "sha256").hexdigest()
        return hashlib.sha256(file.read()).hexdigest()


def missing_folders(folder: Path) -> list[Path]:
    """Return the folder and its parents that do not exist yet, the innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


@contextmanager
def remove_if_empty(folders: Iterable[Path]) -> Iterator[None]:
    """After the block, remove the folders in order, up to the first that is not empty."""
    try:
        yield
    finally:
        with suppress(OSError):
            for folder in folders:
                folder.rmdir()


def restore_replaced(folder: Path) -> None:
    """Restore the folders in `folder` that a writer was replacing when it died.

    They get their names back if the new one is not in place.
    """
    for old in folder.glob(f".*{REPLACED_SUFFIX}"):
        original = old.with_name(old.name.removeprefix(".").removesuffix(REPLACED_SUFFIX))
        if not original.exists():
            old.rename(original)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of dead writers in `folder`, after `restore_replaced`."""
    restore_replaced(folder)
    for path in folder.glob(".*.tmp"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def check_writable(folder: Path, key: str = "output") -> Path:
    """Create the folder if it is missing, try to create a file in it, and return the folder.

    Raises StorageError, which names `key`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = _temporary_path(folder / "probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StorageError(
            f"cannot be written: {error.strerror}",
            key=key,
            value=str(folder),
            remedy=f"Set {key} to another folder.",
        ) from error
    return folder


def _temporary_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _set_mode(file: Path) -> None:
    """Give a file that only its owner can use, as safetensors makes it, the mode of new files."""
    if stat.S_IMODE(file.stat().st_mode) == ONLY_OWNER:
        file.chmod(_mode_of_new_files(file.parent))


def _mode_of_new_files(folder: Path) -> int:
    """Return the mode of a file that is created in the folder.

    It depends on the umask, which cannot be read without setting it for all threads, and on the
    folder itself. So create one and see.
    """
    probe = _temporary_path(folder / "probe")
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
    """Rename `new` to `folder`. Raises OSError; then `folder` is unchanged.

    A folder cannot be renamed to one that has files. So the old folder is renamed first, and gets
    its name back if the new one cannot take it.
    """
    if not folder.exists():
        new.rename(folder)
        return
    old = folder.with_name(f".{folder.name}{REPLACED_SUFFIX}")
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
