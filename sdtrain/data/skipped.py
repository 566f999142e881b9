"""What a run knows of the pictures that could not be read and were replaced."""

from collections.abc import Callable, Iterable

import torch.distributed as dist

from sdtrain.data.decode import too_many


class Skipped:
    """Counts the training pictures that were replaced, over all ranks, and bounds the different ones, those of validation among them.

    limit: how many different ones there may be. report: is given one line for each, on rank 0.
    Each rank counts what its own batches bring (`note`); together they know at each line of numbers and each checkpoint (`agree`).
    """

    def __init__(self, *, limit: int, report: Callable[[str], None]) -> None:
        self.limit, self.report = limit, report
        self.replaced, self.names = 0, set()
        self._mine, self._new = 0, {}

    def note(self, skipped: Iterable[tuple[str, str]], count: bool = True) -> None:
        """Takes in a batch's. DataError where there are too many by now, as far as this rank knows."""
        for name, reason in skipped:
            self._mine += count
            if name not in self.names:
                self._new[name] = reason
            if len(self.names | self._new.keys()) > self.limit:
                raise too_many(reason, self.limit)

    def agree(self) -> int:
        """Pictures replaced so far. To be called on all ranks at once; the same on each. DataError as in `note`."""
        told = [(self._mine, self._new)]
        if dist.is_initialized():
            told = [None] * dist.get_world_size()
            dist.all_gather_object(told, (self._mine, self._new))
        new = {name: reason for _, bad in told for name, reason in bad.items()}
        self.replaced, self.names = (
            self.replaced + sum(count for count, _ in told),
            self.names | new.keys(),
        )
        self._mine, self._new = 0, {}
        for reason in new.values():
            self.report(f"data.on_error=skip: {reason} Another takes its place.")
        if new and len(self.names) > self.limit:
            raise too_many(list(new.values())[-1], self.limit)
        return self.replaced

    def state_dict(self) -> dict:
        return {"replaced": self.agree(), "names": sorted(self.names)}

    def load_state_dict(self, state: dict) -> None:
        self.replaced, self.names = state["replaced"], set(state["names"])
