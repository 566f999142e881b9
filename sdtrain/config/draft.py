"""A training configuration, checked as far as that goes without torch: most mistakes are reported
within a second.
"""

import copy
import os
from collections.abc import Iterable
from dataclasses import dataclass, field

from omegaconf import MISSING

from sdtrain.config.check import Checker, check_value, nearest
from sdtrain.config.compose import BRINGS_AUTOENCODER
from sdtrain.config.overrides import typed_keys
from sdtrain.config.path_keys import with_homes_in
from sdtrain.config.plain import check_plain_values
from sdtrain.config.schema import (
    CheckpointSettings,
    LooksSettings,
    TrainConfig,
    TrainerSettings,
    micro_batch,
)
from sdtrain.config.trusted import renewed
from sdtrain.console import warn
from sdtrain.errors import UserError
from sdtrain.runs.layout import FIRST_STAGE_AUTOENCODER
from sdtrain.runs.resume import flat, is_hash
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
"""Groups that a diffusion model needs, and the training of an autoencoder has no use for."""

LOADER_KEYS = {"batch_size": (int, 1), "num_workers": (int, 0), "timeout": (int, 1)}
"""Keys under `data` that the loader reads, whatever the data set: (type, least value)."""
LOADER_DEFAULTS = {"timeout": 600}
"""Of those that a user's own yaml may leave out."""


@dataclass(frozen=True)
class Draft:
    """A checked configuration. It never changes; `config` is a fresh copy each time.

    overrides: the words the user typed. trainer, checkpoint, looks: those sections as objects.
    """

    _config: dict = field(repr=False)
    overrides: tuple[str, ...]
    trainer: TrainerSettings
    checkpoint: CheckpointSettings
    looks: LooksSettings

    @property
    def config(self) -> dict:
        return copy.deepcopy(self._config)

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
        """Keys and groups that may differ from a checkpoint's."""
        return list(self._config["resume_allow"])

    @property
    def has_first_stage(self) -> bool:
        """Whether its autoencoder is trained before it."""
        return bool(self._config.get("first_stage"))


def is_autoencoder(config: dict) -> bool:
    """Whether a training configuration, a saved one too, is of an autoencoder and not of a
    diffusion model.
    """
    model = config.get("model")
    return isinstance(model, dict) and str(model.get("_target_")).endswith("AutoencoderModule")


def is_one_process(config: dict) -> bool:
    """Whether strategy=single is chosen; of a configuration that is not checked yet, too."""
    strategy = config.get("strategy")
    return isinstance(strategy, dict) and str(strategy.get("_target_")).endswith(".single")


def devices_of(config: dict) -> int:
    """trainer.devices of a configuration that is not checked yet; 1 where it is no number."""
    trainer = config.get("trainer")
    devices = trainer.get("devices") if isinstance(trainer, dict) else None
    return devices if isinstance(devices, int) else 1


def check_draft(config: dict, overrides: Iterable[str]) -> Draft:
    """Checks a resolved configuration of `sdtrain`. Raises UserError; the configuration stays as it
    is.
    """
    overrides = tuple(overrides)
    typed = typed_keys(overrides)
    _check_missing(config)
    _check_removed(config, typed)
    config = renewed(config)  # a copy, in which a yaml written for an earlier version is at home
    config = with_homes_in(config)
    # At the root, words that sdtrain fills in below (data, name, schedule) are keys of the user's.
    checker = Checker(typed, filled_in=())
    checker.call(config, "", TrainConfig)
    checker.call(config["checkpoint"], "checkpoint", CheckpointSettings)
    config["looks"] = config.get("looks") or {"share": LooksSettings.share}
    checker.call(config["looks"], "looks", LooksSettings)
    _check_resume_allow(config)
    _check_groups(config)
    _check_callbacks(config)
    check_plain_values(config)
    _place_data(config["data"])
    if config.get("first_stage"):
        _place_first_stage(config, typed)
    _check_loader(config["data"], typed)
    trainer = _trainer_settings(config["trainer"], checker)
    _check_precision(trainer, config["optimizer"])
    micro_batch(config["data"]["batch_size"], trainer.devices, trainer.accumulate)
    checkpoint = CheckpointSettings(**config["checkpoint"])
    looks = LooksSettings(**config["looks"])
    draft = Draft(config, overrides, trainer, checkpoint, looks)
    if draft.is_one_process and trainer.devices > 1:
        raise UserError(
            "needs strategy=ddp; strategy=single is one process on one device",
            key="trainer.devices",
            value=trainer.devices,
        )
    return draft


def _check_removed(config: dict, typed: set[str]) -> None:
    """Says which arguments have no effect any more. UserError for one that was typed."""
    for name, node in (config.get("callbacks") or {}).items():
        gone = set(node or {}) - set(renewed(node) or {}) if isinstance(node, dict) else set()
        for argument in sorted(gone):
            key = f"callbacks.{name}.{argument}"
            problem = "has no effect any more: looks.share is the budget of all looks"
            if key in typed:
                raise UserError(problem, key=key, remedy="Remove it, and set looks.share.")
            warn(f"{key} {problem}.")


def _check_missing(config: dict) -> None:
    """Whether a value is left that only the user can give."""
    for key, value in flat(config):
        if value == "???":
            raise UserError(f"{key} is missing", key=key, remedy=f"Set {key}=...")


def _check_resume_allow(config: dict) -> None:
    known = {key for key, _ in flat(config)}
    for name in ("sha256", "files_sha256"):
        known |= {f"{part}.{name}" for part in known if is_hash(f"{part}.{name}")}
    for key in config["resume_allow"]:
        if key not in known:
            raise UserError(
                f"resume_allow={key}: there is no such key to change.{nearest(key, known)}",
                key="resume_allow",
                remedy="Name keys or groups in resume_allow.",
            )


def _check_groups(config: dict) -> None:
    """Whether the groups are those of what is trained."""
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
        raise UserError(f"{key} is missing", key=key, remedy=f"Give a folder in {key}.")


def _check_callbacks(config: dict) -> None:
    """Whether a callback draws what the model cannot give: samples, or reconstructions."""
    unfit, fitting = "Reconstructions", "default"
    if is_autoencoder(config):
        unfit, fitting = "SampleGrid", "autoencoder"
    for name, node in (config.get("callbacks") or {}).items():
        if node and node["_target_"].endswith(f".{unfit}"):
            raise UserError(
                f"callbacks.{name} cannot look at this model",
                key=f"callbacks.{name}",
                remedy=f"Choose callbacks={fitting}, or remove it with ~callbacks.{name}.",
            )


def _place_first_stage(config: dict, typed: set[str]) -> None:
    """No first stage where the user brings an autoencoder; else the model reads the one that it
    leaves behind.
    """
    if typed & BRINGS_AUTOENCODER:
        config["first_stage"] = None
    else:
        config["model"]["autoencoder"]["path"] = FIRST_STAGE_AUTOENCODER


def _place_data(data: dict) -> None:
    """The folder of pictures by its whole path: it is looked for from other places later."""
    path = data.get("path")
    if data.get("_target_") == "sdtrain.data.images.Images" and isinstance(path, str) and path:
        data["path"] = os.path.abspath(os.path.expanduser(path))


def _check_loader(data: dict, typed: set[str]) -> None:
    for name, (kind, least) in LOADER_KEYS.items():
        key = f"data.{name}"
        if name in LOADER_DEFAULTS:
            data.setdefault(name, LOADER_DEFAULTS[name])
        if name not in data:
            raise UserError(f"{key} is missing", key=key, remedy=f"Set +{key}=...")
        check_value(data[name], kind, key)
        if data[name] < least:
            raise UserError(f"must be at least {least}", key=key, value=data[name])
    if "data.max_skipped" in typed and data.get("on_error") == "fail":
        raise UserError(
            "data.max_skipped has no effect with data.on_error=fail, which leaves none out",
            key="data.max_skipped",
            remedy="Set data.on_error=skip, or remove it.",
        )


def _trainer_settings(node: dict, checker: Checker) -> TrainerSettings:
    own = f"{TrainerSettings.__module__}.{TrainerSettings.__name__}"
    if node.get("_target_", own) != own:
        raise UserError(
            "cannot be chosen: a trainer has sdtrain's own settings",
            key="trainer._target_",
            value=node["_target_"],
            remedy="Remove it.",
        )
    checker.call(node, "trainer", TrainerSettings)
    return TrainerSettings(**{key: v for key, v in node.items() if key != "_target_"})


def _check_precision(trainer: TrainerSettings, optimizer: dict) -> None:
    if trainer.precision == "16-mixed" and optimizer.get("fused"):
        # Lightning leaves unscaling to fused optimizers, after the clipping: gradients would be
        # clipped while they are still scaled.
        raise UserError(
            "needs optimizer.fused=false",
            key="trainer.precision",
            value=trainer.precision,
            remedy="Set it, or choose bf16-mixed.",
        )
