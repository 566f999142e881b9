"""Measures a run instead of training it: builds all that it would, takes a few training steps, and
prints the memory and the time that the run would take. Nothing of it is kept.
"""

import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

import lightning.pytorch as L
import torch

from sdtrain.assemble.model import build_data, seed_weights
from sdtrain.config.cache_keys import OFF
from sdtrain.console import global_rank, warn
from sdtrain.data.depth import EstimatedDepth, blank_depth_map
from sdtrain.models.autoencoder import write_autoencoder
from sdtrain.runs.checkpoint import tensor_bytes
from sdtrain.signals import Signals, exit_code_of
from sdtrain.training.autoencoder_module import AutoencoderModule
from sdtrain.training.callbacks.assembly import build_callbacks
from sdtrain.training.callbacks.ema import EMACallback, averaged_weights
from sdtrain.training.callbacks.order import make_input_watch, make_ranks
from sdtrain.training.checkpoint_io import FolderIO
from sdtrain.training.estimate import first_stage_seconds, format_duration, untrained_autoencoder
from sdtrain.training.first_stage import (
    arguments_of_run,
    check_before_first_stage,
    first_stage_done,
    first_stage_plan,
    refuse_launched_first_stage,
)
from sdtrain.training.optimisation import OptimisedModule
from sdtrain.training.outcome import Run, peak_memory_mb
from sdtrain.training.parts import build_parts, saved_config
from sdtrain.training.plan import Plan
from sdtrain.training.progress import window_ended
from sdtrain.training.summary import Rows, print_table
from sdtrain.training.trainer import build_strategy, make_trainer
from sdtrain.types import PictureData

WARM_UP = 2
"""Steps that are not timed: they allocate memory."""
FEWEST = 3
MOST = 40
"""Limits of the number of timed steps."""
MEASURED_SECONDS = 5.0
"""How long the timed steps should take together, within those limits."""
CALIBRATION = 8
"""Pictures on which the latents of an untrained autoencoder are scaled to unit variance."""
MEBIBYTE = 2**20


@dataclass
class Measured:
    """step_seconds: of an optimizer step. memory_mb: peak memory of the rank that takes most, in
    MiB. saved_mb: size of the state that a checkpoint is copied from, in MiB.
    """

    step_seconds: float = math.nan
    memory_mb: float = math.nan
    saved_mb: float = math.nan


@dataclass
class ProbeSteps(L.Callback):
    """Times optimizer steps, and ends the training after as many as take MEASURED_SECONDS.

    signals: those that this process has received, which end it. ema: the average of the weights.
    """

    signals: Signals
    ema: EMACallback | None
    measured: Measured = field(default_factory=Measured)
    times: list[float] = field(default_factory=list)
    """When the training began, and when each step ended, in seconds."""
    last_step: int = WARM_UP + FEWEST

    def on_train_start(self, trainer: L.Trainer, module: OptimisedModule) -> None:
        self._record_time(module)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: OptimisedModule, outputs, batch, batch_index: int
    ) -> None:
        if self.signals.received:
            raise SystemExit(0 if global_rank() else exit_code_of(self.signals.received))
        if not window_ended(trainer):
            return
        self._record_time(module)
        steps = len(self.times) - 1
        if steps == WARM_UP + 1:
            seconds = self.times[-1] - self.times[-2]
            wanted = math.ceil(MEASURED_SECONDS / max(seconds, 1e-6))
            # The ranks must agree on the last step.
            self.last_step = WARM_UP + trainer.strategy.broadcast(min(MOST, max(FEWEST, wanted)))
        if steps >= self.last_step:
            trainer.should_stop = True

    def on_train_end(self, trainer: L.Trainer, module: OptimisedModule) -> None:
        timed = self.times[min(WARM_UP, len(self.times) - 2) :]
        seconds = (timed[-1] - timed[0]) / (len(timed) - 1)
        average = {} if self.ema is None else self.ema.state_dict()
        with averaged_weights(None, module):
            state = [module.state_dict(), average, trainer.optimizers[0].state_dict()]
            saved_mb = tensor_bytes(state) / MEBIBYTE
        values = torch.tensor([seconds, peak_memory_mb(), saved_mb], device=module.device)
        largest = trainer.strategy.reduce(values, reduce_op="max")
        self.measured = Measured(*largest.tolist())

    def _record_time(self, module: OptimisedModule) -> None:
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
        self.times.append(monotonic())


def _use_blank_depth_maps(data: PictureData) -> None:
    """Read black depth maps in place of those that a run would make first."""
    for name in ("train", "validation"):
        split = data.split(name)
        if isinstance(getattr(split, "depth_of", None), EstimatedDepth):
            split.depth_of = blank_depth_map


def probe(plan: Plan, run: Run) -> None:
    """Train a few steps, and print what the run would take.

    A first stage is not trained: the steps are taken with an autoencoder of random weights, which
    costs as much. A cache is not filled, so that the steps take longer than those of a run that has
    one, and no depth maps are made. Samples, validation, checkpoints and the logger are left out.
    Raises the errors of a run that cannot begin.
    """
    data = build_data(plan.config["data"])
    _use_blank_depth_maps(data)
    check_before_first_stage(plan, data)
    stage = None
    if plan.config.get("first_stage") and not first_stage_done(run.folder):
        refuse_launched_first_stage(plan.config)
        stage = first_stage_plan(plan, arguments_of_run(plan))
    # The same on all ranks, unlike the path of a temporary autoencoder.
    run.ranks = make_ranks(plan, run, saved_config(plan))
    run.console.print("Measuring a few training steps. The run is not started.")
    with tempfile.TemporaryDirectory() as folder:
        measured_plan = plan
        if stage is not None:
            seed_weights(plan.config["seed"], "autoencoder")
            autoencoder = Path(folder) / "autoencoder"
            write_untrained(untrained_autoencoder(stage), data, autoencoder)
            measured_plan = plan.with_autoencoder(autoencoder)
        measured = _measure(measured_plan, data, run, Path(folder))
    if run.ranks is not None:
        run.ranks.finish()
    if global_rank() > 0:
        return
    first_seconds = 0.0
    if stage is not None:
        first_seconds = first_stage_seconds(stage, untrained_autoencoder(stage), data)
    rows = [*_step_rows(plan, measured), *_time_rows(plan, measured, first_seconds)]
    print_table(run.console, f"probe: {plan.config['name']}", rows)


def write_untrained(first: AutoencoderModule, data: PictureData, folder: Path) -> None:
    """Write an autoencoder of random weights whose latents have unit variance."""
    pictures = data.split("validation")  # squares, also with data.buckets=true
    count = min(CALIBRATION, len(pictures))
    images = torch.stack([pictures[(index, index)].image for index in range(count)])
    with torch.no_grad():
        latents = first.net.encode(images).latent_dist.mean
    write_autoencoder(first.net, 1 / latents.std().item(), folder)


def _measure(plan: Plan, data: PictureData, run: Run, scratch: Path) -> Measured:
    """Train the first steps of the run as it would, with files in `scratch`."""
    settings = plan.prechecked.trainer
    parts = build_parts(plan, data, run.folder.path, run.progress)
    for note in parts.notes:
        run.console.print(note)
    callbacks = build_callbacks(
        plan.config,
        settings,
        run_dir=scratch,
        data=parts.data,
        drawing=plan.drawing,
        signals=run.signals,
    )
    steps = ProbeSteps(run.signals, callbacks.ema)
    used = [each for each in (run.ranks, callbacks.ema, steps) if each is not None]
    trainer = make_trainer(
        settings,
        strategy=build_strategy(plan.config["strategy"]),
        batch_size=run.progress.batch_size,
        logger=None,
        callbacks=used,
        run_dir=scratch,
        checkpoint_io=FolderIO(config="", keep=2, max_failed_saves=0, warn=warn),
    )
    watch = make_input_watch(plan, run)
    parts.datamodule.watch = watch
    try:
        trainer.fit(parts.module, datamodule=parts.datamodule)
    finally:
        watch.finish()
    return steps.measured


def _step_rows(plan: Plan, measured: Measured) -> Rows:
    """Return what a step takes."""
    settings = plan.prechecked.trainer
    batch_size = plan.config["data"]["batch_size"]
    where = "on the GPU" if torch.cuda.is_initialized() else "resident"
    rows = []
    if plan.config["data"].get("cache", OFF) != OFF:
        rows.append(("cache", "not filled by a probe: these steps encode their own pictures"))
    of_ranks = f", the largest of {settings.devices} ranks" if settings.devices > 1 else ""
    memory = f"{_mebibytes(measured.memory_mb)} {where} at the peak{of_ranks}"
    images_per_second = batch_size / measured.step_seconds
    return [
        *rows,
        ("memory", f"{memory}; a checkpoint copies another {_mebibytes(measured.saved_mb)}"),
        (
            "speed",
            f"{images_per_second:.3g} images/s, {measured.step_seconds:.3g} s a step of "
            f"{batch_size} in {settings.precision}",
        ),
    ]


def _time_rows(plan: Plan, measured: Measured, first_seconds: float) -> Rows:
    """Return what the whole run takes. first_seconds: of the first stage, 0 without one."""
    settings = plan.prechecked.trainer
    rows = []
    if first_seconds:
        images = plan.config["first_stage"]["max_images"]
        rows.append(("first stage", f"{images:,} images, {format_duration(first_seconds)}"))
    steps = math.ceil(settings.max_images / plan.config["data"]["batch_size"])
    seconds = steps * measured.step_seconds
    training = f"{settings.max_images:,} images, {format_duration(seconds)}"
    limit = settings.max_minutes
    if limit is not None and seconds > 60 * limit:
        seconds = 60 * limit
        training += f", of which trainer.max_minutes={limit:g} allows a part"
    rows.append(("training", training))
    share = plan.prechecked.looks.share
    if share is None:
        rows.append(("looks", "not known: looks.share=null sets no limit"))
    else:
        looks = format_duration(share * seconds)
        rows.append(("looks", f"{looks} at most, samples and validation (looks.share={share:g})"))
    total = first_seconds + seconds * (1 + (share or 0.0))
    rows.append(("together", f"{format_duration(total)}, on this machine under its present load"))
    return rows


def _mebibytes(value: float) -> str:
    """Return a text such as "812 MiB", or "15.4 GiB" from ten gibibytes on."""
    return f"{value / 1024:.1f} GiB" if value >= 10240 else f"{value:.0f} MiB"
