"""Record which folders Hydra creates for a run, so that a refused run removes only those."""

from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from sdtrain.console import global_rank
from sdtrain.files import missing_folders, remove_if_empty

KEY = "new_folders"


class NewFolders(Callback):
    """Writes the list of missing folders into hydra.runtime, before Hydra creates them."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        with suppress(OmegaConfBaseException, OSError):  # Hydra reports these itself
            folder = Path(OmegaConf.select(config, "hydra.run.dir")).absolute()
            with open_dict(config.hydra.runtime):
                config.hydra.runtime[KEY] = list(map(str, missing_folders(folder)))


def remove_if_unused() -> AbstractContextManager[None]:
    """Return a context that finally removes the folders that Hydra created for this run, if they
    are still empty.

    Only the run folder itself is considered if the list is missing, because a primary configuration
    of the user's lacks the callback, and on ranks above 0 that a launcher started, where the list
    belongs to another process.
    """
    runtime = HydraConfig.get().runtime
    created = runtime.get(KEY)
    if created is None or global_rank() > 0:
        created = [runtime.output_dir]
    return remove_if_empty(map(Path, created))
