"""Words to a configuration, outside of Hydra's own command line."""

import copy
from collections.abc import Iterable

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from sdtrain.config.overrides import typed_keys
from sdtrain.models.autoencoder_folder import read_autoencoder_folder
from sdtrain.paths import config_dir
from sdtrain.runs.resume import flat

AUTOENCODER = "sdtrain.models.autoencoder.Autoencoder"
BRINGS_AUTOENCODER = frozenset({"model.autoencoder.path", "model/autoencoder"})
"""Keys by which the user brings an autoencoder, in the place of a first stage."""


def compose_config(name: str, overrides: list[str]) -> dict:
    """configs/NAME.yaml with the overrides, resolved. Raises what Hydra and OmegaConf raise."""
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            composed = compose(name, overrides)
    finally:
        GlobalHydra.instance().clear()
    return resolved(composed, overrides)


def resolved(config: DictConfig, overrides: Iterable[str]) -> dict:
    """The configuration with every reference resolved; the sizes of the autoencoder that are null
    are those of its folder, or of the first stage that trains it.

    overrides: what the user typed. Raises UserError where there is no autoencoder.
    """
    node = OmegaConf.select(config, "model.autoencoder")
    if not isinstance(node, DictConfig) or node.get("_target_") != AUTOENCODER:
        return OmegaConf.to_container(config, resolve=True)
    missing = [name for name in ("latent_channels", "downsampling") if node.get(name, 0) is None]
    if missing and not OmegaConf.is_missing(node, "path"):  # that is reported where it is checked
        config = copy.deepcopy(config)
        sizes = _autoencoder_sizes(config, list(overrides))
        for name in missing:
            config.model.autoencoder[name] = sizes[name]
    return OmegaConf.to_container(config, resolve=True)


def _autoencoder_sizes(config: DictConfig, overrides: list[str]) -> dict[str, int]:
    stage = config.get("first_stage")
    if stage and not typed_keys(overrides) & BRINGS_AUTOENCODER:
        words = [f"experiment={stage.experiment}", *config_search_path()]
        model = compose_config("train", words)["model"]
        halvings = len(model["block_channels"]) - 1
        return {"latent_channels": model["latent_channels"], "downsampling": 2**halvings}
    found = read_autoencoder_folder(config.model.autoencoder.path)
    return {"latent_channels": found.latent_channels, "downsampling": found.downsampling}


def known_keys(name: str) -> list[str]:
    """Every key of configs/NAME.yaml as it is without overrides."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return [key for key, _ in flat(OmegaConf.to_container(compose(name)))]


def current_overrides() -> list[str]:
    """What the user typed, inside a running Hydra command."""
    # Not resolved: an override may hold ${...} of its own.
    return OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)


def config_search_path() -> list[str]:
    """hydra.searchpath as the user typed it, as overrides for another process; none outside of a
    Hydra command.
    """
    if not HydraConfig.initialized():
        return []
    typed = HydraConfig.get().overrides.hydra
    return search_path_words(OmegaConf.to_container(typed, resolve=False))


def search_path_words(overrides: Iterable[str]) -> list[str]:
    """Those of the overrides that set hydra.searchpath."""
    return [word for word in overrides if word.lstrip("+").startswith("hydra.searchpath=")]
