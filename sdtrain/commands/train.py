"""sdtrain: trains."""

import signal
import sys
import tempfile
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from sdtrain.config.boundary import run_command
from sdtrain.config.compose import compose_config, current_overrides, resolved
from sdtrain.config.draft import check_draft, is_one_process
from sdtrain.config.new_folders import removed_if_unused
from sdtrain.config.overrides import is_sweep, split_flags, typed_values
from sdtrain.console import forget_launcher, is_torchrun_follower
from sdtrain.runs.layout import RunFolder
from sdtrain.runs.lock import alone_in
from sdtrain.runs.start import check_start
from sdtrain.sweep.record import sweep_folder


def task(cfg: DictConfig) -> None:
    run = RunFolder(Path(HydraConfig.get().runtime.output_dir))
    config = resolved(cfg, current_overrides())
    if is_one_process(config):
        forget_launcher()
    with removed_if_unused(), alone_in(run.path):  # a run that is refused leaves nothing
        draft = check_draft(config, current_overrides())
        check_start(run, draft.resume, draft.has_first_stage)
        from sdtrain.training.run import train

        train(draft, run.path)


def run_folder(arguments: list[str]) -> list[str]:
    """Overrides that say where the run lies, where ${now:...} must not decide."""
    if is_torchrun_follower():  # it would resolve ${now:} by itself: the folder is rank 0's
        return [f"hydra.run.dir={tempfile.mkdtemp()}"]
    if is_sweep(arguments):
        return sweep_folder(arguments)
    words = split_flags(arguments)[1]
    typed = typed_values(words)
    if typed.get("resume", "never") == "never" or "hydra.run.dir" in typed:
        return []
    draft = check_draft(compose_config("train", words), words)
    from sdtrain.training.resume import newest_unfinished

    found = newest_unfinished(draft)
    return [f"hydra.run.dir={found}"] if found else []


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback, until the run itself listens
    kind = "sweep" if is_sweep(sys.argv[1:]) else "run"
    run_command(task, "train", output_key=f"hydra.{kind}.dir", more=run_folder)


if __name__ == "__main__":
    main()
