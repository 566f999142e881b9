"""What all commands share around Hydra. Imports neither torch nor Lightning, so that --help and completion are quick."""

import os
import sys
from collections.abc import Callable

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from sdtrain.config.overrides import is_sweep, prepared
from sdtrain.errors import UserError
from sdtrain.paths import config_dir


def overrides_here() -> list[str]:
    """What the user typed, inside a running command."""
    return OmegaConf.to_container(
        HydraConfig.get().overrides.task, resolve=False
    )  # an override may hold ${...} of its own


def typed_keys(overrides: list[str]) -> set[str]:
    return {override.partition("=")[0].lstrip("+~").partition("@")[0] for override in overrides}


def bounded_main(
    app: Callable[[], None],
    config: str,
    arguments: list[str],
    *,
    repeatable: str | None = None,
    more: Callable[[list[str]], list[str]] | None = None,
) -> None:
    """Runs a Hydra command on the user's words; what Hydra itself refuses becomes one paragraph and exit code 2."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing and leaving with 1
    from sdtrain.console import FOREIGN, fail, paragraph

    try:
        words = prepared(arguments, repeatable)
        if empty := next(
            (word for word in words if word in ("hydra.run.dir=", "hydra.sweep.dir=")), None
        ):
            raise UserError(f"{empty} is empty. Give a folder.")
        sys.argv[1:] = words + prepared(more(words) if more else [])
        app()
    except FOREIGN as error:
        fail(2, paragraph(error, lambda: known_keys(config)))
    except UserError as error:
        fail(error.exit_code, " ".join(str(error).split()))
    except OSError as error:  # the run's folder cannot be made
        key = "hydra.sweep.dir" if is_sweep(arguments) else "hydra.run.dir"
        fail(
            5,
            f"{key} cannot be made: {error.strerror}: {error.filename}. Set {key} to another place.",
        )


def known_keys(config: str) -> list[str]:
    from sdtrain.config.check import flat

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return [key for key, _ in flat(OmegaConf.to_container(compose(config)))]
