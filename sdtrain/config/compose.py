"""Words to a configuration, outside of Hydra's own command line."""

from collections.abc import Iterable

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from sdtrain.paths import config_dir
from sdtrain.runs.resume import flat


def compose_config(name: str, overrides: list[str]) -> dict:
    """configs/NAME.yaml with the overrides, resolved. Raises what Hydra and OmegaConf raise."""
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            return OmegaConf.to_container(compose(name, overrides), resolve=True)
    finally:
        GlobalHydra.instance().clear()


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
