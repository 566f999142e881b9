"""sdtrain: trains."""

import signal
import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from sdtrain.config.boundary import run_command
from sdtrain.config.compose import current_overrides, is_of_this_moment, resolved
from sdtrain.config.draft import check_draft, devices_of, is_one_process
from sdtrain.config.launch import settled_rank, typed_rank
from sdtrain.config.new_folders import removed_if_unused
from sdtrain.config.overrides import is_sweep, typed_values
from sdtrain.console import take_rank
from sdtrain.errors import UserError
from sdtrain.runs.lock import alone_in
from sdtrain.runs.start import check_start
from sdtrain.sweep.record import sweep_folder


def task(cfg: DictConfig) -> None:
    hydra = HydraConfig.get()
    if hydra.mode == RunMode.MULTIRUN and not is_sweep(sys.argv[1:]):
        raise UserError("The configuration is a sweep's", key="hydra.mode", remedy="Add -m.")
    folder = Path(hydra.runtime.output_dir)
    with removed_if_unused():  # a run that is refused leaves nothing
        config = resolved(cfg, current_overrides())
        take_rank(settled_rank(devices_of(config), is_one_process=is_one_process(config)))
        with alone_in(folder, is_of_this_moment=is_of_this_moment(hydra.run)) as run:
            draft = check_draft(config, current_overrides())
            check_start(run, draft.resume, draft.has_first_stage)
            from sdtrain.training.run import train

            train(draft, run.path)


def folder_words(arguments: list[str]) -> list[str]:
    """Overrides that say where the run or the sweep lies, where ${now:...} must not decide."""
    if is_sweep(arguments):
        return sweep_folder(arguments)
    from sdtrain.training.run_dir import run_dir_overrides

    return run_dir_overrides(arguments)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback, until the run itself listens
    words = sys.argv[1:]
    kind = "sweep" if is_sweep(words) else "run"
    take_rank(0 if kind == "sweep" else typed_rank(typed_values(words)))
    run_command(task, "train", output_key=f"hydra.{kind}.dir", more=folder_words)


if __name__ == "__main__":
    main()
