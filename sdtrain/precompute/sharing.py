"""Share work, such as filling a store, among the processes that do it at the same time.

The work is divided into batches, which have the same names in every process. A claim (claims.py) is
the right to compute one batch, and one process at a time has it. Every process does the same:

1. It goes through all batches, and claims each that no other process has claimed. If something is
   missing in it, the process computes that; otherwise it gives up the claim at once.
2. It gives up the claim on a batch that it has computed when the results are written. Whoever gets
   the claim after that finds them there, and does not compute them again.
3. When no batch is left to claim, it waits for those that the others have claimed. All that it has
   computed is written by then, so that no two processes wait for each other.

When a process dies its claims end with it. A process that waits then claims what the dead one has
not written, and goes on with 1.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from sdtrain.precompute.claims import Claims

PAUSE = 0.5
"""Seconds between two looks at what other processes have written."""


class Batch(NamedTuple):
    """Items that one process computes together. name: the same in every process."""

    name: str
    items: Sequence[Any]


class SharedWork:
    """What one process sees of the work.

        work = SharedWork(claims, batches, missing_in)
        while work.is_left:
            while batch := work.claim_next():
                ...  # compute the results
                work.note_computed(batch.name)
            ...  # write all results
            work.release_computed()
            work.wait_for_others(report)

    Args:
        claims: of the processes that share the work.
        batches: all that has to be in the store at the end.
        missing_in: returns the items of a batch whose results are not written now.
    """

    def __init__(
        self, claims: Claims, batches: Iterable[Batch], missing_in: Callable[[Batch], list]
    ) -> None:
        self.claims = claims
        self.missing_in = missing_in
        self._to_claim = deque(batches)
        self._claimed_by_others: list[Batch] = []
        self._computed: list[str] = []
        """Names of the batches whose results are not written yet."""

    @property
    def is_left(self) -> bool:
        """Whether there are batches that this process should try to claim."""
        return bool(self._to_claim)

    def claim_next(self) -> Batch | None:
        """Claim the next batch in which something is missing, and return it with those items alone.

        None if there is no other. A batch that another process has claimed is left for
        `wait_for_others`.
        """
        while self._to_claim:
            batch = self._to_claim.popleft()
            if not self.claims.take(batch.name):
                self._claimed_by_others.append(batch)
                continue
            missing = self.missing_in(batch)
            if missing:
                return Batch(batch.name, missing)
            self.claims.release([batch.name])
        return None

    def note_computed(self, name: str) -> None:
        """Note that all of a claimed batch was computed."""
        self._computed.append(name)

    def release_computed(self) -> None:
        """Give up the claims on the batches that were computed, all of which are written."""
        self.claims.release(self._computed)
        self._computed.clear()

    def wait_for_others(self, report: Callable[[int], None]) -> None:
        """Wait until nothing is missing in the batches that other processes have claimed, or until
        one of them can be claimed, because its process has ended without having written it.

        report: called at each look with the number of items that are missing.
        """
        while self._claimed_by_others:
            count = 0
            incomplete = []
            for batch in self._claimed_by_others:
                missing = self.missing_in(batch)
                if missing:
                    count += len(missing)
                    incomplete.append(batch)
            self._claimed_by_others = incomplete
            report(count)
            # A process may take its own claim once more, as `claim_next` then does.
            if any(self.claims.take(batch.name) for batch in incomplete):
                self._to_claim.extend(incomplete)
                self._claimed_by_others = []
            elif incomplete:
                time.sleep(PAUSE)
