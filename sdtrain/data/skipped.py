"""What a run knows of the pictures that could not be read and were replaced."""

from collections.abc import Callable, Iterable

import torch.distributed as dist

from sdtrain.data.split import too_many_broken


class Skipped:
    """Counts the training pictures that were replaced, over all ranks.

    It bounds how many different ones there may be, those of validation among them. Each rank counts
    what its own batches bring (`note`); together they know at each line of numbers and each
    checkpoint (`agree`).

    Args:
        limit: how many different ones there may be.
        report: is given one line for each, on rank 0.
    """

    def __init__(self, *, limit: int, report: Callable[[str], None]) -> None:
        self.limit = limit
        self.report = report
        self.replaced = 0
        self.names: set[str] = set()
        self._replaced_here = 0
        self._reasons_here: dict[str, str] = {}

    def note(self, skipped: Iterable[tuple[str, str]], count: bool = True) -> None:
        """Takes in those of a batch, (name, reason) each.

        Raises DataError where there are too many by now, as far as this rank knows.
        """
        for name, reason in skipped:
            self._replaced_here += count
            if name not in self.names:
                self._reasons_here[name] = reason
            if len(self.names | self._reasons_here.keys()) > self.limit:
                raise too_many_broken(reason, self.limit)

    def agree(self) -> int:
        """Pictures replaced so far; the same on each rank. To be called on all ranks at once.

        Raises DataError as `note` does.
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
            self.report(f"data.on_error=skip: {reason} Another takes its place.")
        if new and len(self.names) > self.limit:
            raise too_many_broken(list(new.values())[-1], self.limit)
        return self.replaced

    def state_dict(self) -> dict:
        """What a checkpoint holds of it. To be called on all ranks at once."""
        return {"replaced": self.agree(), "names": sorted(self.names)}

    def load_state_dict(self, state: dict) -> None:
        """The inverse of `state_dict`."""
        self.replaced = state["replaced"]
        self.names = set(state["names"])
