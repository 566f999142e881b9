"""The callbacks of a run in the order in which they act."""

import lightning.pytorch as L

from sdtrain.console import global_rank
from sdtrain.runs.resume import refuse_different_ranks
from sdtrain.training.callbacks.assembly import CallbackSet
from sdtrain.training.callbacks.checkpoint import Checkpoints
from sdtrain.training.callbacks.progress import ProgressBar
from sdtrain.training.outcome import Run
from sdtrain.training.plan import Plan
from sdtrain.training.ranks import Ranks
from sdtrain.training.stopping import Stopping


def ordered_callbacks(
    plan: Plan, run: Run, callbacks: CallbackSet, config: str
) -> list[L.Callback]:
    """config: the run's yaml, which has to be the same on all ranks."""
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
    ordered = [callbacks.ema] if callbacks.ema else []
    ordered += [callbacks.metrics_log, bar, *callbacks.looking, stopping, checkpoints]
    if not plan.draft.is_one_process:
        run.ranks = Ranks(
            rank=global_rank(),
            timeout=plan.config["strategy"]["timeout"],
            run_dir=run.folder.path,
            config=config,
            compare=refuse_different_ranks,
            leave=run.leave,
        )
        ordered.insert(0, run.ranks)
    return ordered
