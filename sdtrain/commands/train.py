"""sdtrain: trains."""

import os
import signal
import sys
import tempfile
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from sdtrain.config.boundary import run_command
from sdtrain.config.compose import current_overrides
from sdtrain.config.draft import check_draft
from sdtrain.config.overrides import is_sweep, typed_values
from sdtrain.files import removed_if_empty


def task(cfg: DictConfig) -> None:
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    with removed_if_empty(run_dir):  # a run that is refused leaves nothing behind
        draft = check_draft(OmegaConf.to_container(cfg, resolve=True), current_overrides())
        from sdtrain.training.run import train

        train(draft, run_dir)


def run_folder(arguments: list[str]) -> list[str]:
    """Overrides that say where the run lies, where ${now:...} must not decide."""
    if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("RANK", 0)) > 0:
        # Each rank that torchrun starts would resolve ${now:} by itself: the folder is rank 0's.
        return [f"hydra.run.dir={tempfile.mkdtemp()}"]
    if is_sweep(arguments):
        from sdtrain.sweep.record import sweep_folder

        return sweep_folder(arguments)
    typed = typed_values(arguments)
    if typed.get("resume") not in ("auto", "must") or "hydra.run.dir" in typed:
        return []
    from sdtrain.training.resume import newest_unfinished

    found = newest_unfinished([word for word in arguments if not word.startswith("-")])
    return [f"hydra.run.dir={found}"] if found else []


def main() -> None:
    # Until the run listens itself: Ctrl-C while it starts needs no traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    key = "hydra.sweep.dir" if is_sweep(sys.argv[1:]) else "hydra.run.dir"
    run_command(task, "train", output_key=key, more=run_folder)


if __name__ == "__main__":
    main()
