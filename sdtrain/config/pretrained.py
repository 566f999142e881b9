"""Fill a configuration with what the folder of a pretrained pipeline says: where its parts are, its
schedule, its prediction and its size of pictures. Does not import torch.
"""

from pathlib import Path
from typing import Any, Literal, get_args

from omegaconf import DictConfig, OmegaConf, open_dict

from sdtrain.config.check import check_value
from sdtrain.errors import UserError
from sdtrain.models.hub import find_pipeline
from sdtrain.models.pipeline_folder import (
    KEY,
    TEXT_ENCODER,
    TOKENIZER,
    UNET,
    VAE,
    PipelineFolder,
    read_pipeline_folder,
)

Part = Literal["unet", "text_encoder"]
"""A part of a pretrained model that can be trained."""

PRETRAINED_KEYS = {
    "pretrained": str,
    "revision": str | None,
    "variant": Literal["fp16", "bf16"] | None,
    "train": list[Part],
    "frozen_dtype": Literal["fp16", "bf16"] | None,
}
"""Keys under `model` that say which pretrained weights are read, and their types."""

SCHEDULER_DEFAULTS = {
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "num_train_timesteps": 1000,
    "trained_betas": None,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
}
"""Values of diffusers' schedulers for what scheduler_config.json leaves out."""

SCHEDULER_TYPES = {
    "beta_start": float,
    "beta_end": float,
    "num_train_timesteps": int,
    "trained_betas": list[float] | None,
}
"""Types of the values that are read from scheduler_config.json."""

PREDICTIONS = {"epsilon": "Epsilon", "v_prediction": "V", "sample": "X0"}
"""{prediction_type of diffusers: class of sdtrain.diffusion.prediction}."""


def fill_from_pretrained(config: DictConfig) -> DictConfig:
    """Return a copy of a composed configuration that is filled from the folder of model.pretrained.

    schedule, prediction, modifiers and data.image_size are filled in if they are empty. Other
    configurations are returned as they are. Raises UserError if the folder cannot be used.
    """
    node = config.get("model")
    if not isinstance(node, DictConfig) or not {"_target_", "pretrained"} <= node.keys():
        return config
    if OmegaConf.is_missing(node, "pretrained") or not isinstance(node.pretrained, str):
        raise UserError(
            f"{KEY} is missing",
            key=KEY,
            remedy=f"Set {KEY} to the folder of a pipeline in diffusers' layout, or to its id on "
            "the Hugging Face hub.",
        )
    source = node.pretrained
    for name, hint in PRETRAINED_KEYS.items():
        check_value(OmegaConf.to_container(node, resolve=False).get(name), hint, f"model.{name}")
    _check_parts(node.train)
    path = find_pipeline(source, node.revision, node.variant)
    pipeline = read_pipeline_folder(path, source, node.variant)
    filled = OmegaConf.create(OmegaConf.to_container(config, resolve=False))
    with open_dict(filled):
        _fill_parts(filled.model, path)
        if not filled.get("schedule"):
            filled.schedule = schedule_node(pipeline, source)
            if pipeline.scheduler.get("rescale_betas_zero_snr"):
                modifier = {
                    "_target_": "sdtrain.schedules.modifiers.zero_terminal_snr",
                    "_partial_": True,
                }
                filled.modifiers = {"zero_terminal_snr": modifier} | (filled.get("modifiers") or {})
        if not filled.get("prediction"):
            filled.prediction = prediction_node(pipeline, source)
        if filled.data.get("image_size", 0) is None:
            filled.data.image_size = _image_size(pipeline, source)
    return filled


def _image_size(pipeline: PipelineFolder, source: str) -> int:
    """Return the side of the pictures that the UNet was trained on. Raises UserError if it is not
    known.
    """
    if pipeline.image_size is None:
        raise UserError(
            f"{KEY}={source} has no single sample_size in unet/config.json, from which the size of "
            "the pictures follows",
            key="data.image_size",
            remedy="Set data.image_size.",
        )
    return pipeline.image_size


def _check_parts(train: Any) -> None:
    """Raise UserError unless model.train names parts that can be trained."""
    allowed = get_args(Part)
    if not train or any(part not in allowed for part in train) or UNET not in train:
        raise UserError(
            "must name the parts to train",
            key="model.train",
            value=list(train or []),
            allowed="[unet] or [unet,text_encoder]",
        )


def _fill_parts(model: DictConfig, path: Path) -> None:
    """Set the folders of the parts, unless the user has named others."""
    source = model.pretrained
    folders = {
        "unet.architecture": UNET,
        "unet.weights": UNET,
        "conditioner.architecture": TEXT_ENCODER,
        "conditioner.weights": TEXT_ENCODER,
        "conditioner.tokenizer": TOKENIZER,
        "autoencoder.path": VAE,
    }
    for key, subfolder in folders.items():
        if OmegaConf.select(model, key) == source:  # as the yaml has it
            OmegaConf.update(model, key, str(path / subfolder))
    if "trained" in model.conditioner:
        model.conditioner.trained = TEXT_ENCODER in model.train


def schedule_node(pipeline: PipelineFolder, source: str) -> dict[str, Any]:
    """Return the node of the schedule in scheduler_config.json. Raises UserError if it is none of
    sdtrain's.
    """
    scheduler = SCHEDULER_DEFAULTS | pipeline.scheduler
    for key, hint in SCHEDULER_TYPES.items():
        try:
            check_value(scheduler[key], hint, key)
        except UserError as error:
            found = f"{key}={scheduler[key]!r}"
            raise _scheduler_error(source, found, "schedule") from error
    count = scheduler["num_train_timesteps"]
    if scheduler["trained_betas"] is not None:
        betas = list(scheduler["trained_betas"])
        return _schedule("table.table", num_timesteps=count, betas=betas, alphas_cumprod=None)
    name = scheduler["beta_schedule"]
    if name == "squaredcos_cap_v2":
        return _schedule("cosine.cosine", num_timesteps=count, offset=0.008, max_beta=0.999)
    if name in ("linear", "scaled_linear"):
        ends = {key: float(scheduler[key]) for key in ("beta_start", "beta_end")}
        return _schedule(f"{name}.{name}", num_timesteps=count, **ends)
    raise _scheduler_error(source, f"beta_schedule={name}", "schedule")


def _schedule(target: str, **arguments: Any) -> dict[str, Any]:
    return {"_target_": f"sdtrain.schedules.{target}", **arguments}


def prediction_node(pipeline: PipelineFolder, source: str) -> dict[str, Any]:
    """Return the node of the prediction in scheduler_config.json. Raises UserError if it is none
    of sdtrain's.
    """
    name = (SCHEDULER_DEFAULTS | pipeline.scheduler)["prediction_type"]
    if name not in PREDICTIONS:
        raise _scheduler_error(source, f"prediction_type={name}", "prediction")
    return {"_target_": f"sdtrain.diffusion.prediction.{PREDICTIONS[name]}"}


def _scheduler_error(source: str, found: str, group: str) -> UserError:
    return UserError(
        f"has a scheduler_config.json with {found}, for which sdtrain has no {group}",
        key=KEY,
        value=source,
        remedy=f"Choose one with {group}=NAME, or set {KEY} to another folder.",
    )


def replaced_lines(config: dict) -> list[str]:
    """Return a line for each of schedule and prediction that is not that of model.pretrained."""
    model = config["model"]
    if not isinstance(model.get("pretrained"), str):
        return []
    source = model["pretrained"]
    path = find_pipeline(source, model["revision"], model["variant"])
    pipeline = read_pipeline_folder(path, source, model["variant"])
    lines = []
    for group, node_of in (("schedule", schedule_node), ("prediction", prediction_node)):
        try:
            pretrained = node_of(pipeline, source)
        except UserError:
            continue
        chosen = config[group]
        if chosen != pretrained:
            lines.append(
                f"{group}={_last_name(chosen)} replaces {_last_name(pretrained)}, with which "
                f"{source} was trained."
            )
    return lines


def _last_name(node: dict) -> str:
    return str(node["_target_"]).rpartition(".")[2]
