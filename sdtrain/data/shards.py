"""Shards: files of arrays of one shape, each found by its key and read by memory map.

A shard is a safetensors file with three tensors: `keys` [N, 16] and `pictures` [N, 32] as bytes,
and `values` [N, ...]. Its metadata hold a CRC-32 of the first two, which is checked when the shard
is opened, one of the values, which is checked once in each process, before the first is read, and a
hash of the identity of the network that the values come from.
"""

import hashlib
import json
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sdtrain.errors import StorageError, first_line
from sdtrain.files import atomic_file
from sdtrain.weight_files import read_header

KEY_BYTES = 16
DIGEST_BYTES = 32
SUFFIX = ".safetensors"
REMEDY = (
    "Run sdtrain-precompute with the same words, which replaces the damaged part, or set "
    "data.cache to another folder."
)

DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2")}
"""Types of the values, by their names in a safetensors file."""

MISSING = -1
"""Stands in a place for a key that no shard has."""


def key_of(**parts: object) -> bytes:
    """Return the key of an array: a hash of everything that it depends on, as JSON."""
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).digest()[:KEY_BYTES]


class DamagedError(StorageError):
    """A shard is not as it was written. `damaged_error` makes one.

    When a loader worker raises it, it is made again from its text alone: so that is all that the
    constructor needs.

    Args:
        problem: see UserError.
        remedy: see UserError.
        path: of the shard.
    """

    def __init__(self, problem: str, *, remedy: str = "", path: Path | None = None) -> None:
        super().__init__(problem, key="data.cache", remedy=remedy)
        self.path = path


def damaged_error(path: Path, reason: str) -> DamagedError:
    """Return the error for a damaged shard. reason: continues a sentence about it."""
    return DamagedError(f"{path}, a part of the cache, {reason}", remedy=REMEDY, path=path)


def identity_hash(identity: Mapping[str, Any]) -> str:
    """Return a hash of everything that all arrays of a folder depend on: {name: plain value}."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def write_shard(
    folder: Path,
    keys: Sequence[bytes],
    values: np.ndarray,
    pictures: Sequence[bytes],
    *,
    identity: str,
) -> Path:
    """Write a shard, named by its keys, so that it is complete or not there.

    Raises OSError or SafetensorError, as safetensors does on a full disk.

    Args:
        folder: of the shards; it exists.
        keys: N different ones.
        values: [N, ...], float32 or float16.
        pictures: N SHA-256 digests of the pictures that the values were made of; zeros if of none.
        identity: the `identity_hash` of what the values depend on.
    """
    tensors = {
        "keys": _as_bytes(keys, KEY_BYTES),
        "pictures": _as_bytes(pictures, DIGEST_BYTES),
        "values": np.ascontiguousarray(values),
    }
    index_crc = zlib.crc32(tensors["pictures"], zlib.crc32(tensors["keys"]))
    metadata = {
        "identity": identity,
        "index_crc32": str(index_crc),
        "values_crc32": str(zlib.crc32(tensors["values"])),
    }
    name = hashlib.sha256(b"".join(keys)).hexdigest()[:16]
    path = folder / f"{name}{SUFFIX}"
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata)
    return path


def _as_bytes(items: Sequence[bytes], length: int) -> np.ndarray:
    return np.frombuffer(b"".join(items), dtype=np.uint8).reshape(len(items), length)


class Shard:
    """One file of arrays. The values are opened when the first is read, in each process by itself.

    Raises DamagedError if it is incomplete or its index was changed, OSError if it is gone.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._values: np.ndarray | None = None
        try:
            header = read_header(path)
            with safe_open(path, "numpy") as file:
                metadata = file.metadata() or {}
                keys = file.get_tensor("keys")
                pictures = file.get_tensor("pictures")
            self._values_crc32 = int(metadata["values_crc32"])
            index_crc = int(metadata["index_crc32"])
            self.identity = metadata["identity"]
            node = header["values"]
            self.dtype = DTYPES[node["dtype"]]
        except (ValueError, KeyError, SafetensorError) as error:
            raise damaged_error(path, f"cannot be read: {error}") from error
        if zlib.crc32(pictures, zlib.crc32(keys)) != index_crc:
            raise damaged_error(path, "has other bytes than were written")
        self.keys = keys
        self.pictures = pictures
        self.shape = tuple(node["shape"])
        end = max(each["data_offsets"][1] for each in header.values())
        self._offset = path.stat().st_size - end + node["data_offsets"][0]

    def check(self) -> None:
        """Open the values and compare their checksum. Raises DamagedError."""
        try:
            values = np.memmap(self.path, self.dtype, "r", self._offset, self.shape)
        except (OSError, ValueError) as error:  # it is gone, or has another length by now
            raise damaged_error(self.path, f"cannot be read: {first_line(error)}") from error
        if zlib.crc32(values) != self._values_crc32:
            raise damaged_error(self.path, "has other bytes than were written")
        self._values = values

    def read(self, row: int) -> np.ndarray:
        """Return a copy of one array, as float32.

        Raises DamagedError at the first call in a process if any value was changed, or the file is
        gone.
        """
        if self._values is None:
            self.check()
        return self._values[row].astype(np.float32)

    def __getstate__(self) -> dict:
        # A process that is started afresh opens the file itself.
        return self.__dict__ | {"_values": None}


class ShardFolder:
    """The shards of a folder, and where each key is.

    Another process may add shards: `refresh` finds them. `damaged` collects the errors of shards
    that were left out. Several shards may have the same key: the one with the smallest file name
    counts, in whatever order they appeared.

    Args:
        folder: of the shards; it need not exist.
        identity: the `identity_hash` of what the arrays should depend on.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder = folder
        self.identity = identity
        self.shards: list[Shard] = []
        self.damaged: list[DamagedError] = []
        self._places: dict[bytes, tuple[int, int]] = {}
        self._names: set[str] = set()
        self._changed_at = 0
        self.refresh()

    def refresh(self) -> None:
        """Open the shards that have been added.

        Raises OSError, and StorageError if one is of another identity.
        """
        if not self.folder.is_dir():
            return
        changed_at = self.folder.stat().st_mtime_ns
        if changed_at == self._changed_at:
            return
        # Clocks of file systems are coarse: another file may still appear at the same time.
        is_settled = time.time_ns() - changed_at > 10**9
        for path in sorted(self.folder.glob(f"[!.]*{SUFFIX}")):
            if path.name not in self._names:
                self._open(path)
        self._changed_at = changed_at if is_settled else 0

    def _open(self, path: Path) -> None:
        self._names.add(path.name)
        try:
            shard = Shard(path)
        except FileNotFoundError:  # removed meanwhile, because it was damaged
            return
        except DamagedError as error:
            self.damaged.append(error)
            return
        if shard.identity != self.identity:
            raise StorageError(
                f"{path}, a part of the cache, was made by another network or with other settings",
                key="data.cache",
                remedy="Set data.cache to another folder or to auto, or remove the folder.",
            )
        number = len(self.shards)
        self.shards.append(shard)
        for row, key_as_array in enumerate(shard.keys):
            key = key_as_array.tobytes()
            known = self._places.get(key)
            if known is None or path.name < self.shards[known[0]].path.name:
                self._places[key] = (number, row)

    def remove_damaged(self) -> list[DamagedError]:
        """Remove the files that were left out, and return their errors. Raises OSError."""
        removed = self.damaged
        for error in removed:
            error.path.unlink(missing_ok=True)
            self._names.discard(error.path.name)  # it may be written again
        self.damaged = []
        return removed

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def places(self, keys: Iterable[bytes | None]) -> np.ndarray:
        """Return (number of the shard, row) of each key, int32 [N, 2]; MISSING if there is none."""
        none = (MISSING, MISSING)
        found = [none if key is None else self._places.get(key, none) for key in keys]
        return np.array(found, dtype=np.int32).reshape(-1, 2)

    def check(self, numbers: Iterable[int]) -> list[DamagedError]:
        """Compare the checksums of these shards; return an error for each that was changed."""
        errors = []
        for number in numbers:
            try:
                self.shards[number].check()
            except DamagedError as error:
                errors.append(error)
        return errors
