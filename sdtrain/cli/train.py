"""sdtrain: trains. This module imports neither torch nor Lightning before the task runs, so that --help and completion are quick."""

import os
import sys
import tempfile
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from sdtrain.cli.arguments import prepared
from sdtrain.paths import config_dir


def typed_keys(overrides: list[str]) -> set[str]:
    return {override.partition("=")[0].lstrip("+~").partition("@")[0] for override in overrides}


@hydra.main(config_path=str(config_dir()), config_name="train", version_base="1.3")
def app(cfg: DictConfig) -> None:
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    from sdtrain.cli.session import train

    train(OmegaConf.to_container(cfg, resolve=True), typed_keys(list(HydraConfig.get().overrides.task)), run_dir)


def resumed_folder(arguments: list[str]) -> list[str]:
    """With resume=auto|must and no run folder given: the newest unfinished run of the same name and configuration, as one more override."""
    asked = {key.lstrip("+"): value for key, _, value in (a.partition("=") for a in arguments)}
    if asked.get("resume") not in ("auto", "must") or "hydra.run.dir" in asked or "-m" in arguments or "--multirun" in arguments:
        return []
    from sdtrain.cli.session import newest_unfinished

    found = newest_unfinished([a for a in arguments if not a.startswith(("-", "hydra."))])
    return [f"hydra.run.dir='{found}'"] if found else []


def main() -> None:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing and leaving with 1
    from sdtrain.cli.errors import FOREIGN, fail, paragraph

    typed = sys.argv[1:]
    try:
        sys.argv[1:] = prepared(typed)
        if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("RANK", 0)) > 0:
            # Each rank that torchrun starts would resolve ${now:} by itself: only rank 0 owns the run's folder.
            sys.argv += [f"hydra.run.dir={tempfile.mkdtemp()}", "hydra.output_subdir=null"]
        else:
            sys.argv += resumed_folder(sys.argv[1:])
        app()
    except FOREIGN as error:
        fail(2, paragraph(error, known_keys))
    except OSError as error:  # the run's folder cannot be made
        fail(5, f"The run's folder cannot be made: {error.strerror}: {error.filename}. Set hydra.run.dir to another place.")


def known_keys() -> list[str]:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from sdtrain.cli.check import flat

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return [key for key, _ in flat(OmegaConf.to_container(compose("train")))]


if __name__ == "__main__":
    main()
