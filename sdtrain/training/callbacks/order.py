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
    """Who watches the ranks, where there may be several. config: the run's yaml, which has to be
    the same on all of them.
    """
    if plan.draft.is_one_process:
        return None
    return Ranks(
        rank=global_rank(),
        timeout=step_timeout(plan.config["strategy"]),
        run_dir=run.folder.path,
        config=config,
        compare=refuse_different_ranks,
        leave=run.leave,
    )


def make_input_watch(plan: Plan, run: Run) -> InputWatch:
    """Who watches the loader. Several ranks decide together on signals, after a step."""
    return InputWatch(
        timeout=plan.config["data"]["timeout"],
        signals=run.signals if plan.draft.is_one_process else None,
        progress=run.progress,
        leave=run.leave,
    )


@dataclass(frozen=True)
class Ordered:
    """callbacks: all of a run, in order. looks: the last of them."""

    callbacks: list[L.Callback]
    looks: Looks


def ordered_callbacks(plan: Plan, run: Run, callbacks: CallbackSet) -> Ordered:
    """Who watches the ranks and the average first, then what ends a step and saves it, and what
    looks at the model last.
    """
    stopping = Stopping(
        signals=run.signals,
        max_minutes=plan.draft.trainer.max_minutes,
        progress=run.progress,
    )
    checkpoints = Checkpoints(
        settings=plan.draft.checkpoint,
        run_dir=run.folder.path,
        stopping=stopping,
        progress=run.progress,
    )
    bar = ProgressBar(metrics_log=callbacks.metrics_log, console=run.console)
    first = [callback for callback in (run.ranks, callbacks.ema) if callback is not None]
    looks = Looks(
        looks=callbacks.looks,
        share=plan.draft.looks.share,
        stopping=stopping,
        checkpoints=checkpoints,
        metrics_log=callbacks.metrics_log,
        console=run.console,
    )
    ending = [callbacks.metrics_log, bar, stopping, checkpoints]
    return Ordered([*first, *ending, *callbacks.others, looks], looks)
