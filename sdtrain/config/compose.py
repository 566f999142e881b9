"""Compose configurations outside of Hydra's own command line."""

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

from sdtrain.config.bucket_step import fill_bucket_step
from sdtrain.config.flags import (
    CONFIG_DIR,
    CONFIG_NAME,
    CONFIG_PATH,
    Flag,
    flag_value,
    flag_words,
    read_flags,
)
from sdtrain.config.overrides import typed_keys
from sdtrain.config.pretrained import check_image_size, fill_from_pretrained, image_size_of_unet
from sdtrain.models.autoencoder_folder import read_autoencoder_folder
from sdtrain.paths import config_dir
from sdtrain.runs.resume import flatten

AUTOENCODER = "sdtrain.models.autoencoder.Autoencoder"
AUTOENCODER_KEYS = frozenset({"model.autoencoder.path", "model/autoencoder"})
"""Keys with which the user chooses an autoencoder, so that no first stage is trained."""
DEFAULT_IMAGE_SIZE = 32
"""Side in pixels of the pictures for which the default UNet is made."""
PRIMARY = "train"
"""The primary configuration of sdtrain, unless --config-name names another."""


def compose_config(name: str, overrides: list[str], flags: Sequence[Flag] = ()) -> dict:
    """Compose configs/NAME.yaml with the overrides and resolve it.

    flags: of the command line; those that change the composition are applied. Raises the errors of
    Hydra and OmegaConf.
    """
    GlobalHydra.instance().clear()
    try:
        _initialize(flags)
        composed = compose(flag_value(flags, CONFIG_NAME) or name, overrides)
    finally:
        GlobalHydra.instance().clear()
    return resolve_config(composed, overrides, [*flag_words(flags), *overrides])


def resolve_config(
    config: DictConfig, overrides: Iterable[str], composition: Iterable[str] | None = None
) -> dict:
    """Return the configuration as a dict, with every reference and every size resolved.

    What the folders of model.pretrained and model.architecture say is filled in. Sizes of the
    autoencoder that are null are read from its folder, or from the configuration of the first stage
    that will train it. Raises UserError if there is no autoencoder.

    Args:
        config: as Hydra composed it.
        overrides: those that the user typed.
        composition: arguments that say where config files are; by default those of the running
            command.
    """
    config = copy.deepcopy(fill_from_pretrained(config))
    if composition is None:
        composition = current_composition_arguments()
    _fill_autoencoder_sizes(config, list(overrides), list(composition))
    data = config.get("data")  # a command that only reads a run has none
    if isinstance(data, DictConfig) and data.get("image_size", 0) is None:
        _fill_image_size(config)
    check_image_size(config)
    fill_bucket_step(config)
    return OmegaConf.to_container(config, resolve=True)


def _fill_image_size(config: DictConfig) -> None:
    """Set data.image_size, which is null, to what the model is made for.

    A user's own data set, beside a model that does not say, is left as it is.
    """
    if OmegaConf.select(config, "model.unet.architecture"):
        config.data.image_size = image_size_of_unet(config.model)
    elif str(config.data.get("_target_")).startswith("sdtrain."):
        config.data.image_size = DEFAULT_IMAGE_SIZE


def _fill_autoencoder_sizes(
    config: DictConfig, overrides: list[str], composition: list[str]
) -> None:
    """Set the sizes of the autoencoder that are null. Raises UserError if it does not exist."""
    node = OmegaConf.select(config, "model.autoencoder")
    if not isinstance(node, DictConfig) or node.get("_target_") != AUTOENCODER:
        return
    missing = []
    for name in ("latent_channels", "downsampling"):
        if node.get(name, 0) is None:
            missing.append(name)
    if missing and not OmegaConf.is_missing(node, "path"):  # a missing path is reported later
        sizes = _autoencoder_sizes(config, overrides, composition)
        for name in missing:
            node[name] = sizes[name]


def _autoencoder_sizes(
    config: DictConfig, overrides: list[str], composition: list[str]
) -> dict[str, int]:
    """Return latent_channels and downsampling. Raises UserError if there is no autoencoder."""
    stage = config.get("first_stage")
    if stage and not typed_keys(overrides) & AUTOENCODER_KEYS:
        flags, words = read_flags(first_stage_composition(composition))
        words.append(f"experiment={stage.experiment}")
        model = compose_config(PRIMARY, words, flags)["model"]
        halvings = len(model["block_channels"]) - 1
        return {"latent_channels": model["latent_channels"], "downsampling": 2**halvings}
    folder = read_autoencoder_folder(config.model.autoencoder.path)
    return {"latent_channels": folder.latent_channels, "downsampling": folder.downsampling}


def _initialize(flags: Sequence[Flag]) -> None:
    """Initialize Hydra with the search path that its own command line would use."""
    version.setbase("1.3")
    path = create_config_search_path(flag_value(flags, CONFIG_PATH) or str(config_dir()))
    folder = flag_value(flags, CONFIG_DIR)
    if folder is not None:
        if not os.path.isdir(folder):
            raise SearchPathException(f"Additional config directory '{folder}' not found")
        before = SearchPathQuery(provider="schema")
        path.prepend(provider="command-line", path=f"file://{folder}", anchor=before)
    Hydra.create_main_hydra2(task_name="app", config_search_path=path)


def known_keys(name: str) -> list[str]:
    """Return every key of configs/NAME.yaml, composed without overrides."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return [key for key, _ in flatten(OmegaConf.to_container(compose(name)))]


def current_overrides() -> list[str]:
    """Return the overrides that the user typed for the running Hydra command."""
    # Not resolved, because an override may itself contain ${...}.
    return OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)


def current_composition_arguments() -> list[str]:
    """Return composition_arguments of the running Hydra command; empty outside of one."""
    return composition_arguments(HydraConfig.get()) if HydraConfig.initialized() else []


def composition_arguments(hydra: DictConfig) -> list[str]:
    """Return the arguments with which another process composes the same configuration.

    They name the primary configuration, if it is not sdtrain's, and the folders of config files.

    hydra: the node `hydra` of a configuration.
    """
    name = hydra.job.config_name
    primary = [] if name == PRIMARY else [Flag(CONFIG_NAME, name).word]
    return primary + search_path_arguments(hydra)


def search_path_arguments(hydra: DictConfig) -> list[str]:
    """Return the command-line arguments that add the user's own folders of config files."""
    flags = []
    for source in hydra.runtime.config_sources:
        path = source.path if source["schema"] == "file" else f"{source['schema']}://{source.path}"
        if source.provider == "command-line":
            flags.append(Flag(CONFIG_DIR, path))
        elif source.provider == "main" and path != str(config_dir()):
            flags.append(Flag(CONFIG_PATH, path))
    typed = OmegaConf.to_container(hydra.overrides.hydra, resolve=False)
    search_paths = [word for word in typed if is_search_path(word)]
    return flag_words(flags) + search_paths


def first_stage_composition(composition: list[str]) -> list[str]:
    """Return the arguments with which the first stage of a run finds the user's config files.

    The first stage always uses sdtrain's primary configuration, since the user's own one is about
    the run. The user's folder is therefore passed as --config-dir.

    composition: the composition arguments of the run.
    """
    flags, overrides = read_flags(composition)
    arguments = []
    folder = flag_value(flags, CONFIG_DIR) or flag_value(flags, CONFIG_PATH)
    if folder:
        arguments.append(Flag(CONFIG_DIR, folder).word)
    for override in overrides:
        if is_search_path(override):
            arguments.append(override)
    return arguments


def is_search_path(override: str) -> bool:
    """Whether an override sets the folders in which Hydra searches for config files."""
    return override.lstrip("+").startswith("hydra.searchpath=")


def folder_has_timestamp(node: DictConfig) -> bool:
    """Whether the folder in hydra.run or hydra.sweep is named by the time of the start."""
    return "${now:" in str(OmegaConf.to_container(node, resolve=False)["dir"])
