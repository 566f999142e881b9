"""Words to a configuration, outside of Hydra's own command line."""

import copy
import os
from collections.abc import Iterable, Sequence

from hydra import compose, initialize_config_dir, version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import SearchPathException
from omegaconf import DictConfig, OmegaConf

from sdtrain.config.flags import CONFIG_DIR, CONFIG_NAME, CONFIG_PATH, Flag, read_flags, value_of
from sdtrain.config.overrides import typed_keys
from sdtrain.models.autoencoder_folder import read_autoencoder_folder
from sdtrain.paths import config_dir
from sdtrain.runs.resume import flat

AUTOENCODER = "sdtrain.models.autoencoder.Autoencoder"
BRINGS_AUTOENCODER = frozenset({"model.autoencoder.path", "model/autoencoder"})
"""Keys by which the user brings an autoencoder, in the place of a first stage."""
PRIMARY = "train"
"""The primary configuration of sdtrain, where no --config-name names another."""


def compose_config(name: str, overrides: list[str], flags: Sequence[Flag] = ()) -> dict:
    """configs/NAME.yaml with the overrides, resolved. Raises what Hydra and OmegaConf raise.

    flags: of the command line; those that change what is composed are followed.
    """
    GlobalHydra.instance().clear()
    try:
        _initialize(flags)
        composed = compose(value_of(flags, CONFIG_NAME) or name, overrides)
    finally:
        GlobalHydra.instance().clear()
    return resolved(composed, overrides, [*(flag.word for flag in flags), *overrides])


def resolved(
    config: DictConfig, overrides: Iterable[str], composition: Iterable[str] | None = None
) -> dict:
    """The configuration with every reference resolved; the sizes of the autoencoder that are null
    are those of its folder, or of the first stage that trains it.

    overrides: what the user typed. composition: the words that say where configurations are; those
    of the running command unless given. Raises UserError where there is no autoencoder.
    """
    node = OmegaConf.select(config, "model.autoencoder")
    if not isinstance(node, DictConfig) or node.get("_target_") != AUTOENCODER:
        return OmegaConf.to_container(config, resolve=True)
    missing = [name for name in ("latent_channels", "downsampling") if node.get(name, 0) is None]
    if missing and not OmegaConf.is_missing(node, "path"):  # that is reported where it is checked
        config = copy.deepcopy(config)
        if composition is None:
            composition = current_composition()
        sizes = _autoencoder_sizes(config, list(overrides), list(composition))
        for name in missing:
            config.model.autoencoder[name] = sizes[name]
    return OmegaConf.to_container(config, resolve=True)


def _autoencoder_sizes(
    config: DictConfig, overrides: list[str], composition: list[str]
) -> dict[str, int]:
    stage = config.get("first_stage")
    if stage and not typed_keys(overrides) & BRINGS_AUTOENCODER:
        flags, words = read_flags(where_to_look(composition))
        words.append(f"experiment={stage.experiment}")
        model = compose_config(PRIMARY, words, flags)["model"]
        halvings = len(model["block_channels"]) - 1
        return {"latent_channels": model["latent_channels"], "downsampling": 2**halvings}
    found = read_autoencoder_folder(config.model.autoencoder.path)
    return {"latent_channels": found.latent_channels, "downsampling": found.downsampling}


def _initialize(flags: Sequence[Flag]) -> None:
    """Hydra, looking where its own command line would look."""
    version.setbase("1.3")
    path = create_config_search_path(value_of(flags, CONFIG_PATH) or str(config_dir()))
    folder = value_of(flags, CONFIG_DIR)
    if folder is not None:
        if not os.path.isdir(folder):
            raise SearchPathException(f"Additional config directory '{folder}' not found")
        before = SearchPathQuery(provider="schema")
        path.prepend(provider="command-line", path=f"file://{folder}", anchor=before)
    Hydra.create_main_hydra2(task_name="app", config_search_path=path)


def known_keys(name: str) -> list[str]:
    """Every key of configs/NAME.yaml as it is without overrides."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return [key for key, _ in flat(OmegaConf.to_container(compose(name)))]


def current_overrides() -> list[str]:
    """What the user typed, inside a running Hydra command."""
    # Not resolved: an override may hold ${...} of its own.
    return OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)


def current_composition() -> list[str]:
    """composition_words of the running Hydra command; none outside of one."""
    return composition_words(HydraConfig.get()) if HydraConfig.initialized() else []


def where_to_look(composition: list[str]) -> list[str]:
    """Those of a run's words by which its first stage finds the user's own configurations. Its
    primary configuration is sdtrain's: what the user's says is the run's.
    """
    flags, overrides = read_flags(composition)
    folder = value_of(flags, CONFIG_DIR) or value_of(flags, CONFIG_PATH)
    found = [Flag(CONFIG_DIR, folder).word] if folder else []
    return found + [word for word in overrides if is_search_path(word)]


def composition_words(hydra: DictConfig) -> list[str]:
    """The words by which another process composes as this one does, for the `hydra` node of a
    configuration: its primary configuration, and where configurations are looked for.
    """
    name = hydra.job.config_name
    primary = [] if name == PRIMARY else [Flag(CONFIG_NAME, name).word]
    return primary + search_words(hydra)


def search_words(hydra: DictConfig) -> list[str]:
    """Those of them that say where to look: they name the user's own folders."""
    flags = []
    for source in hydra.runtime.config_sources:
        place = source.path if source["schema"] == "file" else f"{source['schema']}://{source.path}"
        if source.provider == "command-line":
            flags.append(Flag(CONFIG_DIR, place))
        elif source.provider == "main" and place != str(config_dir()):
            flags.append(Flag(CONFIG_PATH, place))
    typed = OmegaConf.to_container(hydra.overrides.hydra, resolve=False)
    return [flag.word for flag in flags] + [word for word in typed if is_search_path(word)]


def is_search_path(word: str) -> bool:
    """Whether an override says where configurations are looked for."""
    return word.lstrip("+").startswith("hydra.searchpath=")


def is_of_this_moment(node: DictConfig) -> bool:
    """Whether the folder of a hydra.run or hydra.sweep is named by the time at which it begins."""
    return "${now:" in str(OmegaConf.to_container(node, resolve=False)["dir"])
