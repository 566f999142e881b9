"""What looks at the model while it trains: when, within which budget, and what is made up for."""

import time
from typing import Protocol, runtime_checkable

import lightning.pytorch as L
from rich.console import Console

from sdtrain.training.callbacks.budget import Budget, Costs, measure_costs, share_of
from sdtrain.training.callbacks.checkpoint import Checkpoints
from sdtrain.training.callbacks.metrics_log import MetricsLog
from sdtrain.training.progress import Progress, window_ended
from sdtrain.training.stopping import LookInterruptedError, Stopping


class Planned(Protocol):
    """A look as large as its budget allows.

    cost: in evaluations, see budget.py; 0 for none. left_out: what the budget has no room for.
    """

    cost: float
    left_out: list[str]


@runtime_checkable
class Look(Protocol):
    """What is under `callbacks` or `validation` and looks at the model.

    weight: of its part of the budget. on_all_ranks: whether ranks share its work; else rank 0 looks
    while the others wait.
    """

    weight: int
    on_all_ranks: bool

    def is_due(self, progress: Progress) -> bool:
        """Whether it looks after the optimizer step that just ended."""

    def plan(
        self, module: L.LightningModule, costs: Costs, allowed: float, *, first: bool, last: bool
    ) -> Planned:
        """The largest look of the run as it stands that costs no more than allowed.

        first: it has not looked before. last: the run has ended.
        """

    def look(
        self, trainer: L.Trainer, module: L.LightningModule, planned: Planned, stopping: Stopping
    ) -> dict[str, float]:
        """Looks, and returns the numbers to log. It calls stopping.go_on() before each network
        evaluation.
        """


class Looks(L.Callback):
    """Lets each look have its turn after the checkpoint is saved, with its part of the budget.

    A signal ends a look at once. Where a run goes on from a checkpoint at which looks were due,
    those that are not in metrics.jsonl are made first, with the weights that they were due for.

    looks: by their names, in order. share: see Budget.
    """

    def __init__(
        self,
        *,
        looks: dict[str, Look],
        share: float | None,
        stopping: Stopping,
        checkpoints: Checkpoints,
        metrics_log: MetricsLog,
        console: Console,
    ) -> None:
        self.looks = looks
        self.budget = Budget(share)
        self.stopping = stopping
        self.checkpoints = checkpoints
        self.metrics_log = metrics_log
        self.console = console
        self.costs: Costs | None = None
        self.looked: list[str] = []
        """Names of those that have looked."""
        self.left_out = ""
        """What the budget had no room for in the last looks."""
        self.told = False
        self.has_state = False

    @property
    def state_key(self) -> str:
        return "looks"

    def state_dict(self) -> dict:
        return {"spent": self.budget.spent, "looked": self.looked}

    def load_state_dict(self, state: dict) -> None:
        self.budget.spent = state["spent"]
        self.looked = list(state["looked"])
        self.has_state = True

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        seen = module.progress.images_seen
        if self.has_state and seen:
            self.look(trainer, module, trainer.strategy.broadcast(self.metrics_log.recorded))
        elif seen:
            # Of an earlier version, which looked before it saved.
            self.budget.take_all(seen)
            self.looked = list(self.looks)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_index: int
    ) -> None:
        if window_ended(trainer):
            self.look(trainer, module, set())

    def look(self, trainer: L.Trainer, module: L.LightningModule, recorded: set[str]) -> None:
        """All that is due, but for what has been recorded."""
        try:
            self._look(trainer, module, recorded)
        except LookInterruptedError:
            self.checkpoints.save(trainer)
            trainer.strategy.checkpoint_io.wait(last=True)
            self.stopping.leave(trainer)

    def _look(self, trainer: L.Trainer, module: L.LightningModule, recorded: set[str]) -> None:
        progress = module.progress
        last = progress.ended
        due = [(name, look) for name, look in self.looks.items() if look.is_due(progress)]
        if not due:
            return
        if self.costs is None:
            self.costs = measure_costs(module, trainer.datamodule, trainer.world_size)
        left = self.budget.left(progress.images_seen, last)
        weights = sum(look.weight for _, look in due)
        left_out = {}
        # Kept as it was until all have looked: a checkpoint in between is gone on from with the
        # whole of them.
        spent = self.budget.spent
        for name, look in due:
            waiting = 1 if look.on_all_ranks else trainer.world_size
            planned = look.plan(
                module,
                self.costs,
                left * look.weight / weights / waiting,
                first=name not in self.looked,
                last=last,
            )
            weights -= look.weight
            left -= planned.cost * waiting
            spent += planned.cost * waiting
            if planned.left_out:
                left_out[name] = planned.left_out
            if planned.cost and f"looks/{name}_seconds" not in recorded:
                self._take_turn(trainer, module, name, planned, spent)
        if not last:
            self.stopping.go_on()  # a signal that came meanwhile does not wait for another step
        self.budget.spent = spent
        self.looked = list(dict.fromkeys([*self.looked, *(name for name, _ in due)]))
        self._tell(left_out, last)

    def _take_turn(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        name: str,
        planned: Planned,
        spent: float,
    ) -> None:
        """One look. Its line in metrics.jsonl tells that it is done."""
        look = self.looks[name]
        began = time.monotonic()
        numbers = {}
        if look.on_all_ranks or trainer.is_global_zero:
            numbers = look.look(trainer, module, planned, self.stopping)
        numbers |= {
            f"looks/{name}_seconds": round(time.monotonic() - began, 3),
            "looks/share": share_of(spent, module.progress.images_seen),
        }
        self.metrics_log.report(trainer, module.progress, numbers)
        self.stopping.wait_for_ranks()

    def _tell(self, left_out: dict[str, list[str]], last: bool) -> None:
        """What was left out, once in mid-run; at the end the summary tells it."""
        parts = [f"{name}: {', '.join(each)}" for name, each in left_out.items()]
        line = f"{'; '.join(parts)} (looks.share={self.budget.share}; null leaves nothing out)"
        if last:
            self.left_out = line if parts else ""
        elif parts and not self.told:
            self.told = True
            self.console.print(f"Looks in mid-run are smaller: {line}", soft_wrap=True)
