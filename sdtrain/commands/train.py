"""The command sdtrain: train a model, or all arms of a sweep."""

import signal
import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from sdtrain.config.boundary import run_command
from sdtrain.config.compose import current_overrides, folder_has_timestamp, resolve_config
from sdtrain.config.importing import collector_off
from sdtrain.config.launch import rank_before_config, rank_for_config
from sdtrain.config.new_folders import remove_if_unused
from sdtrain.config.overrides import is_sweep, typed_values
from sdtrain.config.precheck import devices_of, is_one_process, precheck_config
from sdtrain.console import set_rank
from sdtrain.errors import UserError
from sdtrain.runs.lock import hold_run_folder
from sdtrain.runs.start import check_start
from sdtrain.sweep.record import extra_sweep_overrides


def task(cfg: DictConfig) -> None:
    hydra = HydraConfig.get()
    if hydra.mode == RunMode.MULTIRUN and not is_sweep(sys.argv[1:]):
        raise UserError("The configuration is a sweep", key="hydra.mode", remedy="Add -m.")
    folder = Path(hydra.runtime.output_dir)
    with remove_if_unused():  # a refused run leaves no folders behind
        config = resolve_config(cfg, current_overrides())
        set_rank(rank_for_config(devices_of(config), is_one_process=is_one_process(config)))
        with hold_run_folder(folder, has_timestamp=folder_has_timestamp(hydra.run)) as run:
            prechecked = precheck_config(config, current_overrides())
            check_start(run, prechecked.resume, prechecked.has_first_stage)
            with collector_off():
                from sdtrain.training.run import train
            train(prechecked, run.path)


def folder_overrides(arguments: list[str]) -> list[str]:
    """Return overrides with the folder of the run or sweep to resume; [] for a new one."""
    if is_sweep(arguments):
        return extra_sweep_overrides(arguments)
    from sdtrain.training.run_dir import run_dir_overrides

    return run_dir_overrides(arguments)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback until the run handles signals
    arguments = sys.argv[1:]
    kind = "sweep" if is_sweep(arguments) else "run"
    set_rank(0 if kind == "sweep" else rank_before_config(typed_values(arguments)))
    run_command(task, "train", output_key=f"hydra.{kind}.dir", extra_overrides=folder_overrides)


if __name__ == "__main__":
    main()
