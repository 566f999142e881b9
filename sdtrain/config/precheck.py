"""Check a training configuration as far as possible without torch.

Most mistakes are therefore reported within a second. training/plan.py does the other checks.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from omegaconf import MISSING

from sdtrain.config.adapter import check_adapter
from sdtrain.config.bucket_step import check_bucket_keys
from sdtrain.config.cache_keys import check_cache, fill_in_cache
from sdtrain.config.check import Checker, check_value, suggest
from sdtrain.config.compose import AUTOENCODER_KEYS
from sdtrain.config.conditions import check_conditions
from sdtrain.config.optimizers import check_optimizer_options
from sdtrain.config.overrides import typed_keys
from sdtrain.config.path_keys import expand_homes_in_config
from sdtrain.config.plain_values import check_plain_values
from sdtrain.config.prior import check_prior
from sdtrain.config.schema import (
    CheckpointSettings,
    LooksSettings,
    TrainConfig,
    TrainerSettings,
    micro_batch_size,
)
from sdtrain.config.trusted import upgrade_config
from sdtrain.console import warn
from sdtrain.errors import UserError
from sdtrain.paths import absolute_path
from sdtrain.runs.layout import FIRST_STAGE_AUTOENCODER
from sdtrain.runs.resume import flatten, is_added_by_run
from sdtrain.runs.start import Resume

DIFFUSION_ONLY = (
    "schedule",
    "prediction",
    "weighting",
    "loss",
    "times",
    "noise",
    "sampler",
    "grid",
    "guidance",
)
"""Groups that the training of a diffusion model needs, and that of an autoencoder does not use."""

STORED_PICTURES = "sdtrain.data.dataset.StoredPictures"
"""The data set whose path may be an id of the Hugging Face hub."""
DATA_WITH_PATH = ("sdtrain.data.images.Images", STORED_PICTURES)

LOADER_KEYS = {"batch_size": (int, 1), "num_workers": (int | None, 0), "timeout": (int, 1)}
"""Keys under `data` that the loader reads, whatever the data set: (type, least value)."""
LOADER_DEFAULTS = {"timeout": 600}
"""Values of those that a user's own yaml may leave out."""


@dataclass(frozen=True)
class PrecheckedConfig:
    """A configuration that has passed all checks that need no torch. Immutable.

    Args:
        overrides: those that the user typed.
        trainer: the config section as an object.
        checkpoint: the config section as an object.
        looks: the config section as an object.
    """

    _config: dict = field(repr=False)
    overrides: tuple[str, ...]
    trainer: TrainerSettings
    checkpoint: CheckpointSettings
    looks: LooksSettings

    @property
    def config(self) -> dict:
        """A new copy of the configuration."""
        return copy.deepcopy(self._config)

    def with_precision(self, precision: str) -> "PrecheckedConfig":
        """Return the same configuration with another trainer.precision.

        Raises UserError if the other settings do not fit it.
        """
        config = self.config
        config["trainer"]["precision"] = precision
        trainer = replace(self.trainer, precision=precision)
        _check_precision(trainer, config["optimizer"])
        return replace(self, _config=config, trainer=trainer)

    @property
    def typed(self) -> set[str]:
        """The keys that the user typed."""
        return typed_keys(self.overrides)

    @property
    def trains_autoencoder(self) -> bool:
        return is_autoencoder(self._config)

    @property
    def is_one_process(self) -> bool:
        return is_one_process(self._config)

    @property
    def resume(self) -> Resume:
        return self._config["resume"]

    @property
    def resume_allow(self) -> list[str]:
        """Keys and groups that may differ from those of the checkpoint."""
        return list(self._config["resume_allow"])

    @property
    def has_first_stage(self) -> bool:
        """Whether an autoencoder is trained before the diffusion model."""
        return bool(self._config.get("first_stage"))


def is_autoencoder(config: dict) -> bool:
    """Whether a training configuration, new or saved, trains an autoencoder and not a diffusion
    model.
    """
    model = config.get("model")
    return isinstance(model, dict) and str(model.get("_target_")).endswith("AutoencoderModule")


def is_one_process(config: dict) -> bool:
    """Whether strategy=single is chosen. The configuration need not be checked yet."""
    strategy = config.get("strategy")
    return isinstance(strategy, dict) and str(strategy.get("_target_")).endswith(".single")


def devices_of(config: dict) -> int:
    """Return trainer.devices of a configuration that is not checked yet; 1 if it is not a
    number.
    """
    trainer = config.get("trainer")
    devices = trainer.get("devices") if isinstance(trainer, dict) else None
    return devices if isinstance(devices, int) else 1


def precheck_config(config: dict, overrides: Iterable[str]) -> PrecheckedConfig:
    """Check a resolved configuration of `sdtrain`. Raises UserError; does not change `config`."""
    overrides = tuple(overrides)
    typed = typed_keys(overrides)
    _check_missing(config)
    _check_removed_arguments(config, typed)
    config = upgrade_config(config)  # a copy; the yaml may be from an earlier version
    config = expand_homes_in_config(config)
    # Arguments that sdtrain fills in elsewhere (data, name, schedule) are user's keys at the root.
    checker = Checker(typed, filled_in=())
    checker.call(config, "", TrainConfig)
    checker.call(config["checkpoint"], "checkpoint", CheckpointSettings)
    config["looks"] = config.get("looks") or {"share": LooksSettings.share}
    checker.call(config["looks"], "looks", LooksSettings)
    fill_in_cache(config, checker)
    _check_resume_allow(config)
    _check_groups(config)
    _remove_settings_of_none(config, typed)
    _check_callbacks(config)
    check_plain_values(config)
    _make_data_path_absolute(config["data"])
    if config.get("first_stage"):
        _connect_first_stage(config, typed)
    _check_loader(config["data"], typed)
    check_bucket_keys(config["data"], typed, is_autoencoder(config))
    check_conditions(config, typed)
    check_prior(config["data"], typed, trains_autoencoder=is_autoencoder(config))
    check_adapter(config, typed, trains_autoencoder=is_autoencoder(config))
    check_cache(config, typed, trains_autoencoder=is_autoencoder(config))
    trainer = _trainer_settings(config["trainer"], checker)
    _check_probe(trainer, config["resume"])
    _check_precision(trainer, config["optimizer"])
    check_optimizer_options(config)
    micro_batch_size(config["data"]["batch_size"], trainer.devices, trainer.accumulate)
    checkpoint = CheckpointSettings(**config["checkpoint"])
    looks = LooksSettings(**config["looks"])
    prechecked = PrecheckedConfig(config, overrides, trainer, checkpoint, looks)
    if prechecked.is_one_process and trainer.devices > 1:
        raise UserError(
            "needs strategy=ddp; strategy=single is one process on one device",
            key="trainer.devices",
            value=trainer.devices,
        )
    return prechecked


def _check_removed_arguments(config: dict, typed: set[str]) -> None:
    """Warn of arguments that no longer have an effect. Raises UserError if one was typed."""
    for name, node in (config.get("callbacks") or {}).items():
        if not isinstance(node, dict):
            continue
        for argument in sorted(set(node) - set(upgrade_config(node))):
            key = f"callbacks.{name}.{argument}"
            problem = "no longer has an effect: looks.share is the budget of all looks together"
            if key in typed:
                raise UserError(problem, key=key, remedy="Remove it, and set looks.share.")
            warn(f"{key} {problem}.")


def _check_missing(config: dict) -> None:
    """Raise UserError for a mandatory value (???) that the user has not set."""
    for key, value in flatten(config):
        if value == "???":
            raise UserError(f"{key} is missing", key=key, remedy=f"Set {key}=...")


def _check_resume_allow(config: dict) -> None:
    """Raise UserError for a name in resume_allow that is neither a key nor a group."""
    known = set(dict(flatten(config)))
    for key in sorted(known):
        for hash_key in (f"{key}.sha256", f"{key}.files_sha256"):
            if is_added_by_run(hash_key):
                known.add(hash_key)
    for key in config["resume_allow"]:
        if key not in known:
            raise UserError(
                f"resume_allow={key}: there is no such key to change.{suggest(key, known)}",
                key="resume_allow",
                remedy="Name keys or groups in resume_allow.",
            )


def _check_groups(config: dict) -> None:
    """Raise UserError if a group is missing, or set although an autoencoder is trained."""
    if is_autoencoder(config):
        for key in (*DIFFUSION_ONLY, "first_stage"):
            if config.get(key):
                raise UserError(
                    f"{key} has no effect when an autoencoder is trained",
                    key=key,
                    remedy=f"Remove {key}, or choose model=latent_diffusion.",
                )
        return
    for key in DIFFUSION_ONLY:
        if not config.get(key):
            raise UserError(f"{key} is missing", key=key, remedy=f"Choose one with {key}=NAME.")
    autoencoder = config["model"].get("autoencoder") if isinstance(config["model"], dict) else None
    if isinstance(autoencoder, dict) and autoencoder.get("path") == MISSING:
        key = "model.autoencoder.path"
        raise UserError(f"{key} is missing", key=key, remedy=f"Set {key} to a folder.")


def _remove_settings_of_none(config: dict, typed: set[str]) -> None:
    """Remove what an experiment sets of validation or a callback that the user has switched off.

    Raises UserError for such a setting that the user typed.
    """
    callbacks = config.get("callbacks") or {}
    for parent, prefix, names in (
        (config, "", ("validation", "logger")),
        (callbacks, "callbacks.", tuple(callbacks)),
    ):
        for name in names:
            node = parent.get(name)
            if not isinstance(node, dict) or "_target_" in node:
                continue
            useless = sorted(key for key in typed if key.startswith(f"{prefix}{name}."))
            if useless:
                raise UserError(
                    f"{useless[0]} has no effect: {prefix}{name} is switched off",
                    key=useless[0],
                    remedy="Remove it, or choose the option that it belongs to.",
                )
            parent[name] = None


def _check_callbacks(config: dict) -> None:
    """Raise UserError for a callback that needs the other kind of model: an autoencoder draws no
    samples, a diffusion model no reconstructions.
    """
    unsuitable = "Reconstructions"
    suitable_option = "default"
    if is_autoencoder(config):
        unsuitable = "SampleGrid"
        suitable_option = "autoencoder"
    for name, node in (config.get("callbacks") or {}).items():
        if node and node["_target_"].endswith(f".{unsuitable}"):
            raise UserError(
                f"callbacks.{name} does not work with this model",
                key=f"callbacks.{name}",
                remedy=f"Choose callbacks={suitable_option}, or remove it with ~callbacks.{name}.",
            )


def _connect_first_stage(config: dict, typed: set[str]) -> None:
    """Let the model read the autoencoder that the first stage will save.

    If the user chose an autoencoder, remove the first stage instead.
    """
    if typed & AUTOENCODER_KEYS:
        config["first_stage"] = None
    else:
        config["model"]["autoencoder"]["path"] = FIRST_STAGE_AUTOENCODER


def _make_data_path_absolute(data: dict) -> None:
    """Make the path of pictures absolute: later commands run in other folders.

    An id of the Hugging Face hub is left as it is.
    """
    target = data.get("_target_")
    if target not in DATA_WITH_PATH:
        return
    may_be_hub_id = {
        "path": target == STORED_PICTURES,
        "depth": False,
        "depth_model": True,
        "prior": False,
    }
    for key, allowed in may_be_hub_id.items():
        if data.get(key) and isinstance(data[key], str):
            data[key] = absolute_path(data[key], may_be_hub_id=allowed)


def _check_loader(data: dict, typed: set[str]) -> None:
    """Check the keys of the data loader, and fill in its defaults."""
    for name, (value_type, least) in LOADER_KEYS.items():
        key = f"data.{name}"
        if name in LOADER_DEFAULTS:
            data.setdefault(name, LOADER_DEFAULTS[name])
        if name not in data:
            raise UserError(f"{key} is missing", key=key, remedy=f"Set +{key}=...")
        check_value(data[name], value_type, key)
        if data[name] is not None and data[name] < least:
            raise UserError(f"must be at least {least}", key=key, value=data[name])
    if "data.max_skipped" in typed and data.get("on_error") == "fail":
        raise UserError(
            "data.max_skipped has no effect with data.on_error=fail, which skips no picture",
            key="data.max_skipped",
            remedy="Set data.on_error=skip, or remove it.",
        )


def _trainer_settings(node: dict, checker: Checker) -> TrainerSettings:
    own = f"{TrainerSettings.__module__}.{TrainerSettings.__name__}"
    if node.get("_target_", own) != own:
        raise UserError(
            "cannot be replaced: the trainer always has sdtrain's own settings",
            key="trainer._target_",
            value=node["_target_"],
            remedy="Remove it.",
        )
    checker.call(node, "trainer", TrainerSettings)
    return TrainerSettings(**{key: value for key, value in node.items() if key != "_target_"})


def _check_probe(trainer: TrainerSettings, resume: Resume) -> None:
    if trainer.probe and resume != "never":
        raise UserError(
            f"resume={resume} has no use with trainer.probe=true, which measures a run from its "
            "first step and continues none",
            key="resume",
            remedy="Remove it.",
        )


def _check_precision(trainer: TrainerSettings, optimizer: dict) -> None:
    if trainer.precision == "16-mixed" and optimizer.get("fused"):
        # Lightning leaves unscaling to fused optimizers, which do it after the clipping: gradients
        # would be clipped while they are still scaled.
        raise UserError(
            "needs optimizer.fused=false",
            key="trainer.precision",
            value=trainer.precision,
            remedy="Set it, or choose bf16-mixed.",
        )
