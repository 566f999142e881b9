"""A folder of shards of one kind, to which several processes add."""

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from sdtrain.console import warn
from sdtrain.data.shards import DIGEST_BYTES, ShardFolder, identity_hash, write_shard
from sdtrain.errors import StorageError
from sdtrain.files import write_new_text
from sdtrain.precompute.claims import Claims

SHARD_BYTES = 64 * 2**20
SHARD_SECONDS = 60.0
"""A shard is written once it has this size, or its first array is this old: a process that is
killed loses no more work than that."""

LEFTOVER_SECONDS = 3600.0
"""Age of a temporary file that its writer has abandoned."""

DTYPES = {"fp32": np.float32, "fp16": np.float16}
NO_PICTURE = bytes(DIGEST_BYTES)


class Store:
    """Arrays that one network has computed, by key.

    Args:
        folder: of the shards; it is created by `open_for_writing`.
        identity: everything that all arrays depend on: {name: plain value}. Those of another
            identity in the folder raise StorageError.
        dtype: of the arrays, "fp32" or "fp16".
    """

    def __init__(self, folder: Path, identity: dict[str, Any], dtype: str) -> None:
        self.folder = folder
        self.identity = identity | {"dtype": dtype}
        self.dtype = DTYPES[dtype]
        self.claims: Claims | None = None
        self._identity_hash = identity_hash(self.identity)
        self._pending_keys: set[bytes] = set()
        self._pending: dict[tuple, list[tuple[bytes, np.ndarray, bytes]]] = defaultdict(list)
        self._pending_bytes = 0
        self._pending_since = 0.0
        with storage_errors(folder):
            self._check_identity()
            self.shards = self._open_shards()

    def _open_shards(self) -> ShardFolder:
        return ShardFolder(self.folder, self._identity_hash)

    @property
    def _identity_file(self) -> Path:
        return self.folder / "identity.json"

    def _check_identity(self) -> None:
        """Raise StorageError if the folder holds arrays of another identity."""
        if not self._identity_file.is_file():
            return
        try:
            found = json.loads(self._identity_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise _damaged_error(self._identity_file, str(error)) from error
        if not isinstance(found, dict):
            raise _damaged_error(self._identity_file, "it holds no JSON object")
        differences = []
        for name in sorted(found.keys() | self.identity.keys()):
            there = found.get(name)
            here = self.identity.get(name)
            if there != here:
                differences.append((name, f"{name} {_short(there)} instead of {_short(here)}"))
        if not differences:
            return
        only_dtype = [name for name, _ in differences] == ["dtype"]
        key = "cache.dtype" if only_dtype else "data.cache"
        back = f"set cache.dtype={found.get('dtype')}" if only_dtype else "set these back"
        text = ", ".join(text for _, text in differences)
        raise StorageError(
            f"{self.folder} holds a cache that was made otherwise: {text}",
            key=key,
            remedy=f"Set data.cache to another folder or to auto, {back}, or remove the folder.",
        )

    def open_for_writing(self) -> None:
        """Create the folder, remove what dead writers left, and begin to claim work.

        Shards that are damaged are removed, so that their arrays are computed again. Raises
        StorageError.
        """
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_new_text(self._identity_file, json.dumps(self.identity, indent=1) + "\n")
            self._check_identity()  # another process may have been the first
            self._remove_leftovers()
            self._remove_damaged()
            self.claims = Claims(self.folder / "claims.lock")

    def _remove_leftovers(self) -> None:
        for path in self.folder.glob(".*.tmp"):
            try:
                age = time.time() - path.stat().st_mtime
            except FileNotFoundError:  # its writer has just finished
                continue
            if age > LEFTOVER_SECONDS:
                path.unlink(missing_ok=True)

    def _remove_damaged(self) -> None:
        for error in self.shards.remove_damaged():
            warn(f"{error.problem}. What it held is computed again.")

    def remove_changed(self) -> None:
        """Compare the checksums of all shards, and remove those that were changed."""
        with storage_errors(self.folder):
            errors = self.shards.check(range(len(self.shards.shards)))
            self.shards.damaged += errors
            self._remove_damaged()
            if errors:
                self.shards = self._open_shards()

    def add(self, key: bytes, value: np.ndarray, picture: bytes = NO_PICTURE) -> None:
        """Add an array to the next shard, unless the store has its key.

        An array that exists stays: those of another batch or device differ by rounding, and a run
        that is resumed needs the bits that it has seen.

        picture: SHA-256 of the pixels that it was made of, if it was made of any.
        """
        if key in self._pending_keys or key in self.shards:
            return
        if not self._pending_bytes:
            self._pending_since = time.monotonic()
        stored = value.astype(self.dtype)
        self._pending[stored.shape].append((key, stored, picture))
        self._pending_keys.add(key)
        self._pending_bytes += stored.nbytes

    @property
    def is_due(self) -> bool:
        """Whether enough has been added for a shard."""
        age = time.monotonic() - self._pending_since
        is_old = age > SHARD_SECONDS
        return bool(self._pending_bytes) and (self._pending_bytes >= SHARD_BYTES or is_old)

    def flush(self) -> None:
        """Write what was added, a shard for each shape. Raises StorageError."""
        with storage_errors(self.folder):
            for entries in self._pending.values():
                keys = [key for key, _, _ in entries]
                values = np.stack([value for _, value, _ in entries])
                pictures = [picture for _, _, picture in entries]
                identity = self._identity_hash
                write_shard(self.folder, keys, values, pictures, identity=identity)
            self._pending.clear()
            self._pending_keys.clear()
            self._pending_bytes = 0
            self.shards.refresh()

    def close(self) -> None:
        """Give up all claims."""
        if self.claims is not None:
            self.claims.close()
            self.claims = None


@contextmanager
def storage_errors(folder: Path) -> Iterator[None]:
    """Turn an error of reading or writing a file in the block into a StorageError."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # the latter on a full disk
        reason = getattr(error, "strerror", None) or str(error)
        raise _unreadable_error(folder, reason) from error


def _unreadable_error(path: Path, reason: str) -> StorageError:
    return StorageError(
        f"The cache in {path} cannot be used: {reason}",
        key="data.cache",
        remedy="Set data.cache to another folder, or free space.",
    )


def _damaged_error(path: Path, reason: str) -> StorageError:
    return StorageError(
        f"{path} is damaged: {reason}",
        key="data.cache",
        remedy=f"Remove the folder {path.parent}, or set data.cache to another one.",
    )


def _short(value: Any) -> str:
    """Return the beginning of a hash, and anything else as it is."""
    text = str(value)
    return text[:12] if len(text) == 64 else text


def measure_rounding(values: Sequence[np.ndarray], dtype: str) -> tuple[float, float]:
    """Return the (largest, mean) absolute error of storing float32 arrays in a dtype."""
    together = np.stack(values)
    rounded = together.astype(DTYPES[dtype]).astype(np.float32)
    errors = np.abs(rounded - together)
    return float(errors.max()), float(errors.mean())
