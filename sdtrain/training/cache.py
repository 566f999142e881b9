"""What a run computes before its first step: its cache, depth maps and prior. And the command that
makes them alone."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from sdtrain.assemble.cache_identity import cache_identity
from sdtrain.assemble.load import pick_device
from sdtrain.assemble.model import (
    build_adapter,
    build_autoencoder,
    build_conditioner,
    build_data,
    build_model,
    check_condition,
)
from sdtrain.conditioning.interface import Conditioner
from sdtrain.config.cache_keys import OFF
from sdtrain.config.launch import RANK_0, is_started_by_launcher, is_started_by_rank_0
from sdtrain.config.precheck import PrecheckedConfig
from sdtrain.console import global_rank, make_console
from sdtrain.errors import UserError
from sdtrain.latent_diffusion import LatentDiffusion
from sdtrain.precompute.cache import CacheRequest, with_cache
from sdtrain.precompute.depth import make_depth_maps
from sdtrain.precompute.prior import PriorRequest, draw_prior, is_drawn_here
from sdtrain.signals import Interrupted, Signals, exit_code_of
from sdtrain.training.child import stop_with_parent
from sdtrain.training.datamodule import check_batch, default_workers, set_up_worker
from sdtrain.training.environment import quiet_libraries
from sdtrain.training.input_watch import use_short_socket_folder
from sdtrain.training.outcome import user_error_of_worker
from sdtrain.training.parts import UseCache, set_threads
from sdtrain.training.plan import Plan, make_plan
from sdtrain.training.trainer import check_devices
from sdtrain.types import PictureData

MODULE = "sdtrain.commands.precompute"


def cache_of_run(plan: Plan, console: Console, signals: Signals) -> UseCache | None:
    """Return the function that completes a run's cache; None if it has no cache.

    The function raises Interrupted after a signal.
    """
    if plan.config["data"]["cache"] == OFF:
        return None

    def use_cache(data: PictureData, model: LatentDiffusion) -> PictureData:
        request = _request(plan, model.autoencoder, model.conditioner, console, signals)
        return _with_cache(data, model.autoencoder, model.conditioner, request)

    return use_cache


def _with_cache(
    data: PictureData, autoencoder: nn.Module, conditioner: Conditioner, request: CacheRequest
) -> PictureData:
    """Return a data set, and its prior if it has one, with what is cached, see `with_cache`."""
    cached = with_cache(data, autoencoder, conditioner, request)
    if cached.prior is not None:
        prior = with_cache(cached.prior.data, autoencoder, conditioner, request)
        cached.prior = replace(cached.prior, data=prior)
    return cached


def _request(
    plan: Plan,
    autoencoder: nn.Module,
    conditioner: Conditioner,
    console: Console,
    signals: Signals,
    *,
    is_checked_whole: bool = False,
) -> CacheRequest:
    config = plan.config
    num_workers = config["data"]["num_workers"]
    if num_workers is None:
        num_workers = default_workers(plan.prechecked.trainer.devices)
    if num_workers:
        use_short_socket_folder()

    return CacheRequest(
        folder=config["data"]["cache"],
        dtype=config["cache"]["dtype"],
        autoencoder=cache_identity(config, "autoencoder", autoencoder),
        conditioner=cache_identity(config, "conditioner", conditioner),
        num_workers=num_workers,
        device=_device(plan),
        console=console,
        is_checked_whole=is_checked_whole,
        set_up_worker=set_up_worker,
        check_signals=_signal_check(signals),
    )


def make_depth_of_run(plan: Plan, data: PictureData, console: Console, signals: Signals) -> None:
    """Make the depth maps that data.depth_model has to make. Raises Interrupted after a signal."""
    make_depth_maps(data, _device(plan), console, _signal_check(signals))


def draw_prior_of_run(plan: Plan, run_dir: Path, console: Console, signals: Signals) -> None:
    """Draw the pictures of data.prior that are missing, with the model before it is trained.

    Raises Interrupted after a signal, UserError if the model has no trained weights to draw with.
    """
    data = plan.config["data"]
    prior = data.get("prior")
    if prior is None or data["prior_prompt"] is None or not is_drawn_here(Path(prior)):
        return
    source = plan.config["model"].get("pretrained")
    if source is None or plan.config["model"].get("architecture") is not None:
        raise UserError(
            "holds no pictures, and a model with random weights cannot draw them",
            key="data.prior",
            value=prior,
            remedy="Add pictures, or train a pretrained model.",
        )
    request = PriorRequest(
        folder=Path(prior),
        prompt=data["prior_prompt"],
        count=data["prior_images"],
        image_size=data["image_size"],
        seed=plan.config["seed"],
        drawn_with={"model": source, **plan.drawing.settings},
    )

    def build() -> LatentDiffusion:
        # All that the run is given is looked at before the pictures are drawn. An adapter changes
        # nothing before it is trained.
        subject = build_data(data | {"prior": None})
        check_batch(plan.config["data"]["batch_size"], subject.split("train"), has_prior=True)
        model = build_model(plan.config, run_dir)
        return model.to(_device(plan)).eval()

    draw_prior(request, build, plan.drawing, console, _signal_check(signals))


def _signal_check(signals: Signals) -> Callable[[], None]:
    """Return a function that raises Interrupted after a signal."""

    def check_signals() -> None:
        if signals.received:
            raise Interrupted(exit_code_of(signals.received))

    return check_signals


def _device(plan: Plan) -> torch.device:
    """Return the device of this rank."""
    device = pick_device(plan.prechecked.trainer.accelerator)
    return torch.device(device, global_rank() if device == "cuda" else None)


def precompute(prechecked: PrecheckedConfig) -> None:
    """Make the cache of a run without training it, on as many ranks as the run would have.

    Raises UserError, DataError or StorageError.
    """
    quiet_libraries()
    plan = make_plan(prechecked)
    config = plan.config
    if config["data"]["cache"] != OFF:
        _check_autoencoder_exists(config)
    settings = prechecked.trainer
    check_devices(settings)
    set_threads(settings.threads)
    others = _start_other_ranks(prechecked)
    try:
        _precompute(plan)
    except BaseException:
        for process in others:
            process.terminate()
        raise
    finally:
        codes = [process.wait() for process in others]
    if any(codes):
        raise SystemExit(next(code for code in codes if code))


def _precompute(plan: Plan) -> None:
    config = plan.config
    signals = Signals()
    signals.install()
    console = make_console()
    draw_prior_of_run(plan, Path(), console, signals)
    data = build_data(config["data"])
    for note in getattr(data, "notes", ()):
        console.print(note)
    make_depth_of_run(plan, data, console, signals)
    if config["data"]["cache"] == OFF:
        return
    autoencoder = build_autoencoder(config, Path())
    conditioner = build_conditioner(config, data)
    if config.get("adapter") and "conditioner" in build_adapter(config["adapter"]).parts:
        conditioner.frozen = False
    check_condition(conditioner, data)
    request = _request(plan, autoencoder, conditioner, console, signals, is_checked_whole=True)
    with user_error_of_worker():
        _with_cache(data, autoencoder, conditioner, request)


def _check_autoencoder_exists(config: dict) -> None:
    """Raise UserError if the run would train its autoencoder first."""
    stage = config.get("first_stage")
    if not stage:
        return
    raise UserError(
        "The autoencoder of this run does not exist yet: the run trains it first",
        key="model.autoencoder.path",
        remedy="Set model.autoencoder.path to a folder, or start sdtrain with data.cache=auto, "
        "which fills the cache after the first stage.",
    )


def _start_other_ranks(prechecked: PrecheckedConfig) -> list[subprocess.Popen]:
    """Start this command once for each further rank, unless a launcher has done so."""
    started = is_started_by_launcher() or is_started_by_rank_0()
    if prechecked.is_one_process or started:
        return []
    processes = []
    for rank in range(1, prechecked.trainer.devices):
        environment = os.environ | {RANK_0: str(os.getpid()), "LOCAL_RANK": str(rank)}
        command = [sys.executable, "-m", MODULE, *sys.argv[1:]]
        processes.append(subprocess.Popen(command, env=environment, preexec_fn=stop_with_parent))
    return processes
