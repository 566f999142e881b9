"""Which folders Hydra makes for a run, so that one that is refused leaves those alone that were
there before.
"""

from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from sdtrain.console import global_rank
from sdtrain.files import missing_folders, removed_if_empty

KEY = "new_folders"


class NewFolders(Callback):
    """Writes them into hydra.runtime, before Hydra makes them."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        with suppress(OmegaConfBaseException, OSError):  # Hydra says so itself
            folder = Path(OmegaConf.select(config, "hydra.run.dir")).absolute()
            with open_dict(config.hydra.runtime):
                config.hydra.runtime[KEY] = [str(path) for path in missing_folders(folder)]


def removed_if_unused() -> AbstractContextManager[None]:
    """Removes those afterwards that Hydra has made for this run, where nothing has been written
    into them.

    A configuration of the user's own, without the callback, tells nothing of the folders around;
    and a rank above 0 that a launcher has started has one that was made for it elsewhere.
    """
    runtime = HydraConfig.get().runtime
    found = runtime.get(KEY)
    if found is None or global_rank() > 0:
        found = [runtime.output_dir]
    return removed_if_empty([Path(path) for path in found])
