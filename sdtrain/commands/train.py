"""sdtrain: trains."""

import os
import signal
import sys
import tempfile
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from sdtrain.config.boundary import bounded_main, overrides_here
from sdtrain.config.overrides import is_sweep
from sdtrain.paths import config_dir


@hydra.main(config_path=str(config_dir()), config_name="train", version_base="1.3")
def app(cfg: DictConfig) -> None:
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    from sdtrain.training.session import train

    train(cfg, overrides_here(), run_dir)


def run_folder(arguments: list[str]) -> list[str]:
    """Overrides that say where the run lies, where ${now:...} must not decide."""
    if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("RANK", 0)) > 0:
        # Each rank that torchrun starts would resolve ${now:} by itself: only rank 0 owns the run's folder.
        return [f"hydra.run.dir={tempfile.mkdtemp()}"]
    asked = {key.lstrip("+"): value for key, _, value in (a.partition("=") for a in arguments)}
    if is_sweep(arguments):
        from sdtrain.sweep.launcher import check_words, earlier_sweep, register

        check_words(arguments)
        register()
        found = None if "hydra.sweep.dir" in asked else earlier_sweep(arguments)
        return ([] if "hydra/launcher" in asked else ["hydra/launcher=process"]) + (
            [f"hydra.sweep.dir={found}"] if found else []
        )
    if asked.get("resume") not in ("auto", "must") or "hydra.run.dir" in asked:
        return []
    # With resume=auto|must and no folder given: the newest unfinished run of the same name and configuration.
    from sdtrain.training.session import newest_unfinished

    found = newest_unfinished([a for a in arguments if not a.startswith(("-", "hydra."))])
    return [f"hydra.run.dir={found}"] if found else []


def main() -> None:
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # until the run listens itself: Ctrl-C while it starts needs no traceback
    bounded_main(app, "train", sys.argv[1:], more=run_folder)


if __name__ == "__main__":
    main()
