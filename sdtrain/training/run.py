"""One training run, from its checked configuration to its final summary."""

import sys
from pathlib import Path

from sdtrain.assemble.load import pick_device
from sdtrain.assemble.model import build_data
from sdtrain.config.precheck import PrecheckedConfig
from sdtrain.console import make_console, warn
from sdtrain.runs.layout import CheckpointFolder, RunFolder
from sdtrain.training.cache import cache_of_run, draw_prior_of_run, make_depth_of_run
from sdtrain.training.callbacks.assembly import build_callbacks
from sdtrain.training.callbacks.order import make_input_watch, make_ranks, order_callbacks
from sdtrain.training.checkpoint_io import FolderIO
from sdtrain.training.child import check_arm_digest
from sdtrain.training.environment import quiet_libraries, set_lightning_rank
from sdtrain.training.first_stage import check_before_first_stage, run_first_stage
from sdtrain.training.loggers.media import close_logger, make_logger
from sdtrain.training.outcome import Run, outcome_recorded
from sdtrain.training.parts import (
    build_parts,
    keep_files_for_sampling,
    saved_config,
    set_threads,
    write_config,
)
from sdtrain.training.plan import Plan, make_plan
from sdtrain.training.precision import (
    AUTO,
    Choice,
    check_precision,
    choose_precision,
    saved_precision,
)
from sdtrain.training.probe import probe
from sdtrain.training.progress import Progress
from sdtrain.training.resume import checkpoint_to_resume
from sdtrain.training.summary import print_plan, print_result
from sdtrain.training.trainer import build_strategy, check_devices, make_trainer


def train(prechecked: PrecheckedConfig, run_dir: Path) -> None:
    """Train one run, whose folder the caller has locked.

    Raises UserError or Interrupted if it does not finish; once training has begun, status.json
    records that too.
    """
    quiet_libraries()
    console = make_console()
    set_lightning_rank()
    plan = make_plan(prechecked)
    check_arm_digest(plan.config)
    progress = Progress(plan.config["data"]["batch_size"], prechecked.trainer.max_images)
    run = Run(RunFolder(run_dir), progress, console)
    with outcome_recorded(run):
        run.signals.install()
        for note in plan.notes:
            run.console.print(note)
        check_devices(prechecked.trainer)
        set_threads(prechecked.trainer.threads)
        plan = settle_precision(plan, run)
        if prechecked.trainer.probe:
            probe(plan, run)
        else:
            train_plan(plan, run)


def settle_precision(plan: Plan, run: Run) -> Plan:
    """Return the plan with trainer.precision=auto resolved: to that of the run that is resumed, or
    else to what suits the device.
    """
    settings = plan.prechecked.trainer
    if settings.precision != AUTO:
        return plan
    device = pick_device(settings.accelerator)
    saved = None if plan.prechecked.resume == "never" else saved_precision(run.folder)
    if saved is not None:
        choice = Choice(saved, "the run began with it")
        check_precision(saved, device)
    else:
        trains_autoencoder = plan.prechecked.trains_autoencoder
        choice = choose_precision(device, trains_autoencoder=trains_autoencoder)
    run.console.print(choice.line, soft_wrap=True)
    return plan.with_precision(choice.precision)


def train_plan(plan: Plan, run: Run) -> None:
    """Train the first stage, build data and model, choose the checkpoint to resume from, build the
    callbacks, and fit.
    """
    settings = plan.prechecked.trainer
    draw_prior_of_run(plan, run.folder.path, run.console, run.signals)
    data = build_data(plan.config["data"])
    make_depth_of_run(plan, data, run.console, run.signals)
    check_before_first_stage(plan, data)
    run_first_stage(plan, data, run)
    use_cache = cache_of_run(plan, run.console, run.signals)
    parts = build_parts(plan, data, run.folder.path, run.progress, use_cache)
    for note in parts.notes:
        run.console.print(note)
    print_plan(run, plan, parts)

    config = saved_config(plan, parts)
    checkpoint = checkpoint_to_resume(run, plan, parts, config)
    callbacks = build_callbacks(
        plan.config,
        settings,
        run_dir=run.folder.path,
        data=parts.data,
        drawing=plan.drawing,
        signals=run.signals,
    )
    resumed = CheckpointFolder(checkpoint).images_seen if checkpoint else 0
    logger = make_logger(plan.config, plan.prechecked.typed, run.folder, config, resumed)
    strategy = build_strategy(plan.config["strategy"])
    saving = plan.prechecked.checkpoint
    checkpoint_io = FolderIO(
        config=config, keep=saving.keep, max_failed_saves=saving.max_failed_saves, warn=warn
    )
    run.ranks = make_ranks(plan, run, config)
    ordered = order_callbacks(plan, run, callbacks)
    trainer = make_trainer(
        settings,
        strategy=strategy,
        batch_size=run.progress.batch_size,
        logger=logger,
        callbacks=ordered.callbacks,
        run_dir=run.folder.path,
        checkpoint_io=checkpoint_io,
    )
    watch = make_input_watch(plan, run)
    parts.datamodule.watch = watch
    write_config(run.folder, config)
    keep_files_for_sampling(run.folder, plan, parts)
    run.write_status("running")
    try:
        trainer.fit(parts.module, datamodule=parts.datamodule, ckpt_path=checkpoint)
    finally:
        watch.finish()
        checkpoint_io.settle()
        if logger is not None:
            close_logger(logger, failed=sys.exc_info()[0] is not None)
    run.write_status("finished", 0)
    print_result(run, plan, parts, callbacks, ordered.looks.left_out)
