"""The callbacks of a run in the order in which they act."""

from dataclasses import dataclass

import lightning.pytorch as L

from sdtrain.console import global_rank
from sdtrain.runs.resume import refuse_different_ranks
from sdtrain.training.callbacks.assembly import CallbackSet
from sdtrain.training.callbacks.checkpoint import Checkpoints
from sdtrain.training.callbacks.looks import Looks
from sdtrain.training.callbacks.progress import ProgressBar
from sdtrain.training.input_watch import InputWatch
from sdtrain.training.outcome import Run
from sdtrain.training.plan import Plan
from sdtrain.training.ranks import Ranks
from sdtrain.training.stopping import Stopping
from sdtrain.training.trainer import step_timeout


def make_ranks(plan: Plan, run: Run, config: str) -> Ranks | None:
    """Return the callback that watches the ranks, or None for a run in one process.

    config: the run's yaml, which must be the same on all ranks.
    """
    if plan.prechecked.is_one_process:
        return None
    return Ranks(
        rank=global_rank(),
        timeout=step_timeout(plan.config["strategy"]),
        run_dir=run.folder.path,
        config=config,
        precision=plan.prechecked.trainer.precision,
        check_configs=refuse_different_ranks,
        end_process=run.end_process,
    )


def make_input_watch(plan: Plan, run: Run) -> InputWatch:
    """Return the watch on the data loader.

    It does not act on signals if there are several ranks, which do that together after a step.
    """
    return InputWatch(
        timeout=plan.config["data"]["timeout"],
        signals=run.signals if plan.prechecked.is_one_process else None,
        progress=run.progress,
        end_process=run.end_process,
    )


@dataclass(frozen=True)
class OrderedCallbacks:
    """callbacks: all callbacks of a run, in order. looks: the last of them."""

    callbacks: list[L.Callback]
    looks: Looks


def order_callbacks(plan: Plan, run: Run, callbacks: CallbackSet) -> OrderedCallbacks:
    """Create sdtrain's own callbacks and return all in order: the watch on the ranks, the average
    of the weights, the metrics log, progress bar, stopping and checkpoints, the configured
    callbacks, and the looks.
    """
    stopping = Stopping(
        signals=run.signals,
        max_minutes=plan.prechecked.trainer.max_minutes,
        progress=run.progress,
    )
    checkpoints = Checkpoints(
        settings=plan.prechecked.checkpoint,
        run_dir=run.folder.path,
        stopping=stopping,
        progress=run.progress,
    )
    bar = ProgressBar(metrics_log=callbacks.metrics_log, console=run.console)
    looks = Looks(
        looks=callbacks.looks,
        share=plan.prechecked.looks.share,
        precision=plan.prechecked.trainer.precision,
        stopping=stopping,
        checkpoints=checkpoints,
        metrics_log=callbacks.metrics_log,
        console=run.console,
    )
    ordered: list[L.Callback] = []
    if run.ranks is not None:
        ordered.append(run.ranks)
    if callbacks.ema is not None:
        ordered.append(callbacks.ema)
    ordered += [callbacks.metrics_log, bar, stopping, checkpoints, *callbacks.others, looks]
    return OrderedCallbacks(ordered, looks)
