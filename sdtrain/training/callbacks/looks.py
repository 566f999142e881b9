"""Runs the looks: the callbacks that sample or validate during training, when they are due and
within their budget.
"""

import time
from typing import Protocol, runtime_checkable

import lightning.pytorch as L
from rich.console import Console

from sdtrain.training.callbacks.budget import Budget, Costs, measure_costs, share_spent
from sdtrain.training.callbacks.checkpoint import Checkpoints
from sdtrain.training.callbacks.metrics_log import MetricsLog
from sdtrain.training.precision import compute_precision
from sdtrain.training.progress import Progress, window_ended
from sdtrain.training.stopping import LookInterruptedError, Stopping


class PlannedLook(Protocol):
    """What a look is going to do within its budget.

    cost: in evaluations, see budget.py; 0 if it does nothing. left_out: what the budget has no room
    for.
    """

    cost: float
    left_out: list[str]


@runtime_checkable
class Look(Protocol):
    """A callback under `callbacks` or `validation` that samples or validates during training.

    weight: the weight of its part of the budget. on_all_ranks: whether the ranks share its work;
    otherwise rank 0 does it while the others wait.
    """

    weight: int
    on_all_ranks: bool

    def is_due(self, progress: Progress) -> bool:
        """Return whether it runs after the optimizer step that just ended."""

    def plan(
        self, module: L.LightningModule, costs: Costs, allowed: float, *, first: bool, last: bool
    ) -> PlannedLook:
        """Return the look at the current model, of as many pictures as `allowed` pays for.

        allowed: evaluations of the network. first: whether this is the first look of its kind in
        the run. last: whether the run has ended.
        """

    def look(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        planned: PlannedLook,
        stopping: Stopping,
    ) -> dict[str, float]:
        """Sample or validate as planned, and return the metrics to log.

        Must call stopping.check_interrupted() before each network evaluation.
        """


@runtime_checkable
class LookAtStart(Protocol):
    """A look that also runs before the first step, if the model starts with pretrained weights."""

    def plan_at_start(self, module: L.LightningModule, costs: Costs, allowed: float) -> PlannedLook:
        """Return the largest look at the model that costs at most `allowed` evaluations."""

    def look_at_start(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        planned: PlannedLook,
        stopping: Stopping,
    ) -> None:
        """Draw or measure what was planned before the first step, unless an earlier start of this
        run has done it. Checks for signals as `Look.look` does.
        """


class Looks(L.Callback):
    """Runs each look that is due, after the checkpoint is saved, with its part of the budget.

    A signal ends a look at once. When a run resumes from a checkpoint at which looks were due,
    those that are not in metrics.jsonl yet run first, with the weights of that checkpoint.

    looks: {name: look}, in the order in which they run. share: see Budget. precision: that of the
    training steps, in which the networks compute here too.
    """

    def __init__(
        self,
        *,
        looks: dict[str, Look],
        share: float | None,
        precision: str,
        stopping: Stopping,
        checkpoints: Checkpoints,
        metrics_log: MetricsLog,
        console: Console,
    ) -> None:
        self.looks = looks
        self.budget = Budget(share)
        self.precision = precision
        self.stopping = stopping
        self.checkpoints = checkpoints
        self.metrics_log = metrics_log
        self.console = console
        self.costs: Costs | None = None
        self.run_before: list[str] = []
        """Names of the looks that have run at least once."""
        self.left_out = ""
        """What the budget had no room for in the looks at the end of the run."""
        self.has_warned = False
        self.has_state = False

    @property
    def state_key(self) -> str:
        return "looks"

    def state_dict(self) -> dict:
        return {"spent": self.budget.spent, "looked": self.run_before}

    def load_state_dict(self, state: dict) -> None:
        self.budget.spent = state["spent"]
        self.run_before = list(state["looked"])
        self.has_state = True

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        seen = module.progress.images_seen
        if self.has_state and seen:
            recorded = trainer.strategy.broadcast(self.metrics_log.recorded)
            self.run_due(trainer, module, recorded)
        elif seen:
            # The checkpoint is from an earlier version, which ran the looks before it saved.
            self.budget.assume_all_spent(seen)
            self.run_before = list(self.looks)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if module.progress.images_seen == 0:
            for name, look in self.looks.items():
                if isinstance(look, LookAtStart):
                    self._run_at_start(trainer, module, name, look)

    def _run_at_start(
        self, trainer: L.Trainer, module: L.LightningModule, name: str, look: LookAtStart
    ) -> None:
        """Run a look before the first step, on rank 0 while the others wait.

        A signal ends it; the run then stops after the first step, with a checkpoint.
        """
        costs = self._measured_costs(trainer, module)
        allowed = self.budget.left_at_start(module.progress.max_images) / trainer.world_size
        planned = look.plan_at_start(module, costs, allowed)
        self.budget.spent += planned.cost * trainer.world_size
        for line in planned.left_out:
            self.console.print(f"{name}: {line} ({self._limit})", soft_wrap=True)
        if not planned.cost:
            return
        try:
            if trainer.is_global_zero:
                with compute_precision(self.precision, module.device.type):
                    look.look_at_start(trainer, module, planned, self.stopping)
            self.stopping.wait_for_ranks()
        except LookInterruptedError:
            return

    def _measured_costs(self, trainer: L.Trainer, module: L.LightningModule) -> Costs:
        """Return the costs of the model, which are measured once."""
        if self.costs is None:
            self.costs = measure_costs(module, trainer.datamodule, trainer.world_size)
        return self.costs

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_index: int
    ) -> None:
        if window_ended(trainer):
            self.run_due(trainer, module, set())

    def run_due(self, trainer: L.Trainer, module: L.LightningModule, recorded: set[str]) -> None:
        """Run the looks that are due, and save and leave if a signal ends one.

        recorded: metrics logged already at this number of images; looks that logged some of them
        do not run again.
        """
        try:
            self._run_due(trainer, module, recorded)
        except LookInterruptedError:
            self.checkpoints.save(trainer, module)
            trainer.strategy.checkpoint_io.wait(last=True)
            self.stopping.raise_interrupted(trainer)

    def _run_due(self, trainer: L.Trainer, module: L.LightningModule, recorded: set[str]) -> None:
        progress = module.progress
        last = progress.ended
        due = [(name, look) for name, look in self.looks.items() if look.is_due(progress)]
        if not due:
            return
        costs = self._measured_costs(trainer, module)
        left = self.budget.left(progress.images_seen, last)
        weights = sum(look.weight for _, look in due)
        left_out = {}
        # Stored in the budget only when all looks have run: a checkpoint saved in between has the
        # old value, and all of them are planned again from it.
        spent = self.budget.spent
        for name, look in due:
            # The other ranks wait while rank 0 runs a look alone, which costs as much again.
            ranks_busy = 1 if look.on_all_ranks else trainer.world_size
            planned = look.plan(
                module,
                costs,
                left * look.weight / weights / ranks_busy,
                first=name not in self.run_before,
                last=last,
            )
            weights -= look.weight
            left -= planned.cost * ranks_busy
            spent += planned.cost * ranks_busy
            if planned.left_out:
                left_out[name] = planned.left_out
            if planned.cost and f"looks/{name}_seconds" not in recorded:
                self._run_look(trainer, module, name, planned, spent)
        if not last:
            # A signal that came meanwhile must not wait for another training step.
            self.stopping.check_interrupted()
        self.budget.spent = spent
        new = [name for name, _ in due if name not in self.run_before]
        self.run_before = [*self.run_before, *new]
        self._announce_left_out(left_out, last)

    def _run_look(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        name: str,
        planned: PlannedLook,
        spent: float,
    ) -> None:
        """Run one look and log its metrics. Their line in metrics.jsonl records that it has run."""
        look = self.looks[name]
        began = time.monotonic()
        metrics = {}
        if look.on_all_ranks or trainer.is_global_zero:
            with compute_precision(self.precision, module.device.type):
                metrics = look.look(trainer, module, planned, self.stopping)
        metrics |= {
            f"looks/{name}_seconds": round(time.monotonic() - began, 3),
            "looks/share": share_spent(spent, module.progress.images_seen),
        }
        self.metrics_log.log_metrics(trainer, module.progress, metrics)
        self.stopping.wait_for_ranks()

    @property
    def _limit(self) -> str:
        return f"looks.share={self.budget.share}; null sets no limit"

    def _announce_left_out(self, left_out: dict[str, list[str]], last: bool) -> None:
        """Print what was left out, the first time this happens before the end of the run; at the
        end keep it for the summary.
        """
        parts = [f"{name}: {', '.join(each)}" for name, each in left_out.items()]
        line = f"{'; '.join(parts)} ({self._limit})"
        if last:
            self.left_out = line if parts else ""
        elif parts and not self.has_warned:
            self.has_warned = True
            message = f"Samples and validations during training are reduced: {line}"
            self.console.print(message, soft_wrap=True)
