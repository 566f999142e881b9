"""Share the batches of a computation among the processes that add to one store."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sdtrain.precompute.store import Store

PAUSE = 0.5
"""Seconds between two looks at what other processes have claimed."""


class Batch(NamedTuple):
    """Items that one process computes together. name: the same in every process."""

    name: str
    items: Sequence[Any]


@dataclass
class SharedWork:
    """Claims batches, and waits for those that other processes have claimed.

    Args:
        store: of the results, open for writing.
        missing_in: returns the items of a batch that are not in the store.
        waiting: called while others compute, with how many items they have left.
    """

    store: Store
    missing_in: Callable[[Batch], list]
    waiting: Callable[[int], None]
    _held_by_others: list[Batch] = field(default_factory=list)

    def run(self, batches: list[Batch], compute: Callable[[Iterable[Batch]], None]) -> None:
        """Return once nothing is missing in the batches.

        compute: takes batches of missing items, in the order in which it should compute them,
        writes the results and calls `finish`.
        """
        remaining = self._compute_unclaimed(batches, compute)
        while remaining:
            left = []
            count = 0
            for batch in remaining:
                missing = self.missing_in(batch)
                if missing:
                    left.append(batch)
                    count += len(missing)
            self.waiting(count)
            remaining = left
            # Of a process that has ended before it computed all that it had claimed.
            free = [batch for batch in left if self.store.claims.take(batch.name)]
            if free:
                remaining += self._compute_unclaimed(free, compute)
            elif left:
                time.sleep(PAUSE)

    def _compute_unclaimed(
        self, batches: list[Batch], compute: Callable[[Iterable[Batch]], None]
    ) -> list[Batch]:
        """Compute the batches that no other process has claimed, and return the others."""
        self._held_by_others = []
        compute(self._claim(batches))
        return self._held_by_others

    def _claim(self, batches: list[Batch]) -> Iterator[Batch]:
        for batch in batches:
            if not self.store.claims.take(batch.name):
                self._held_by_others.append(batch)
                continue
            missing = self.missing_in(batch)
            if missing:
                yield Batch(batch.name, missing)
            else:
                self.store.claims.release([batch.name])

    def finish(self, names: list[str]) -> None:
        """Give up the claims on batches whose results are written, and clear the list."""
        self.store.claims.release(names)
        names.clear()
