"""Count the training pictures that could not be read and were replaced."""

from collections.abc import Callable, Iterable

import torch.distributed as dist

from sdtrain.data.split import too_many_broken_error


class Skipped:
    """Counts the replaced training pictures over all ranks.

    It also limits how many different ones there may be, validation pictures included. Each rank
    records the pictures of its own batches (`note`); the ranks exchange their records whenever
    metrics are logged and checkpoints written (`synchronise`).

    Args:
        limit: how many different pictures may be replaced.
        warn: called on rank 0 with one line for each of them.
    """

    def __init__(self, *, limit: int, warn: Callable[[str], None]) -> None:
        self.limit = limit
        self.warn = warn
        self.replaced = 0
        self.names: set[str] = set()
        self._replaced_here = 0
        self._reasons_here: dict[str, str] = {}

    def note(self, skipped: Iterable[tuple[str, str]], count: bool = True) -> None:
        """Record the pictures replaced in one batch, as (name, reason).

        count: whether they add to `replaced`; they count towards `limit` in any case. Raises
        DataError once this rank knows of more than `limit` different ones.
        """
        for name, reason in skipped:
            self._replaced_here += count
            if name not in self.names:
                self._reasons_here[name] = reason
            if len(self.names | self._reasons_here.keys()) > self.limit:
                raise too_many_broken_error(reason, self.limit)

    def synchronise(self) -> int:
        """Exchange the records of all ranks and return how many pictures were replaced so far.

        Every rank must call this at the same time; all get the same number. Raises DataError if the
        ranks together replaced more than `limit` different pictures.
        """
        of_ranks = [(self._replaced_here, self._reasons_here)]
        if dist.is_initialized():
            mine = of_ranks[0]
            of_ranks = [None] * dist.get_world_size()
            dist.all_gather_object(of_ranks, mine)
        new: dict[str, str] = {}
        for replaced, reasons in of_ranks:
            self.replaced += replaced
            new |= reasons
        self.names = self.names | new.keys()
        self._replaced_here = 0
        self._reasons_here = {}
        for reason in new.values():
            self.warn(f"data.on_error=skip: {reason} Another picture takes its place.")
        if new and len(self.names) > self.limit:
            raise too_many_broken_error(list(new.values())[-1], self.limit)
        return self.replaced

    def state_dict(self) -> dict:
        """Return the state for a checkpoint. Every rank must call this at the same time."""
        return {"replaced": self.synchronise(), "names": sorted(self.names)}

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned."""
        self.replaced = state["replaced"]
        self.names = set(state["names"])
