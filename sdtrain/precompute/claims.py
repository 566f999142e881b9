"""Share the work of a cache among processes: each claims a batch before it computes it."""

import errno
import fcntl
import hashlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from sdtrain.console import warn

HELD = (errno.EACCES, errno.EAGAIN)
"""What a lock that another process holds fails with."""

PLACES = 1 << 62
"""Number of bytes of the lock file, which stays empty: one can lock a byte that is not there."""


class Claims:
    """The claims of this process: locks of single bytes of one file.

    They end with the process, however it ends, so that another one can take over. Where the file
    system has no locks everything can be claimed: processes may then do the same work twice, which
    has the same result.

    Args:
        path: of the lock file. Raises OSError if it cannot be created.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "ab")
        self._has_locks = True

    def take(self, name: str) -> bool:
        """Claim the work of this name; return False if another process has claimed it."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _place(name))
        except OSError as error:
            if error.errno in HELD:
                return False
            self._warn(error)
            return True
        return True

    def release(self, names: Iterable[str]) -> None:
        """Give up claims."""
        for name in names:
            with suppress(OSError):  # a file system without locks
                fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _place(name))

    def close(self) -> None:
        """Close the file, which gives up all claims."""
        self._file.close()

    def _warn(self, error: OSError) -> None:
        if self._has_locks:
            self._has_locks = False
            warn(
                f"The file system of {self._file.name} does not support locks ({error.strerror}): "
                "several processes would compute the same latents."
            )


def _place(name: str) -> int:
    """Return the byte that stands for the work of this name."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % PLACES
