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
    Architecture,
    PipelineFolder,
    channel_condition_of,
    check_fit,
    has_vocabulary,
    read_architecture,
    read_json,
    read_pipeline_folder,
)
from sdtrain.paths import config_dir, find_folder

Part = Literal["unet", "text_encoder"]
"""A part of a pretrained model that can be trained."""

PRETRAINED_KEYS = {
    "pretrained": str | None,
    "architecture": str | None,
    "revision": str | None,
    "variant": Literal["fp16", "bf16"] | None,
    "train": list[Part] | None,
    "frozen_dtype": Literal["fp16", "bf16"] | None,
}
"""Keys under `model` that say which pretrained weights are read, and their types."""

PIPELINE_FOLDERS = {
    "unet.architecture": UNET,
    "unet.weights": UNET,
    "conditioner.architecture": TEXT_ENCODER,
    "conditioner.weights": TEXT_ENCODER,
    "conditioner.tokenizer": TOKENIZER,
    "autoencoder.path": VAE,
}
"""{key of the model: subfolder of the pipeline that it names}."""

SIDES = 8
"""The sides of a picture are multiples of so many pixels, in a pipeline of Stable Diffusion."""

SHIPPED_TOKENIZER = Path("data/stable_diffusion/tokenizer")
"""CLIP's vocabulary."""
SHAPES_AUTOENCODER = Path("data/shapes_autoencoder")
"""The autoencoder without model.pretrained, unless a first stage trains one."""

SCHEDULER_DEFAULTS = {
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "num_train_timesteps": 1000,
    "trained_betas": None,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "use_flow_sigmas": False,
    "flow_shift": 1.0,
}
"""Values of diffusers' schedulers for what scheduler_config.json leaves out."""

SCHEDULER_TYPES = {
    "beta_start": float,
    "beta_end": float,
    "num_train_timesteps": int,
    "trained_betas": list[float] | None,
}
"""Types of the values that are read from scheduler_config.json."""

PREDICTIONS = {"epsilon": "Epsilon", "v_prediction": "V", "sample": "X0", "flow_prediction": "Flow"}
"""{prediction_type of diffusers: class of sdtrain.diffusion.prediction}."""


def fill_from_pretrained(config: DictConfig) -> DictConfig:
    """Return a copy of a composed configuration that is filled from the folders of
    model.architecture and model.pretrained.

    schedule, prediction, modifiers and the folders of the parts are filled in if they are empty.
    Other configurations are returned as they are. Raises UserError if a folder cannot be used.
    """
    node = config.get("model")
    if not isinstance(node, DictConfig) or not {"_target_", *PRETRAINED_KEYS} <= node.keys():
        return config
    for name, hint in PRETRAINED_KEYS.items():
        if not OmegaConf.is_missing(node, name):
            value = OmegaConf.to_container(node, resolve=False)[name]
            check_value(value, hint, f"model.{name}")
    source = None if OmegaConf.is_missing(node, "pretrained") else node.pretrained
    if source is None and node.architecture is None:
        raise UserError(
            f"{KEY} is missing",
            key=KEY,
            remedy=f"Set {KEY} to the folder of a pipeline in diffusers' layout, to a safetensors "
            "file of Stable Diffusion, or to an id on the Hugging Face hub.",
        )
    _check_effects(node, source)
    filled = OmegaConf.create(OmegaConf.to_container(config, resolve=False))
    described = None
    with open_dict(filled):
        if node.architecture is not None:
            described = _fill_architecture(filled.model, source)
        if source is not None:
            path = find_pipeline(source, node.revision, node.variant)
            pipeline = read_pipeline_folder(path, source, node.variant)
            if described is not None:
                check_fit(described.unet, pipeline, source)
            _fill_folders(filled.model, PIPELINE_FOLDERS, source, path)
            filled.first_stage = None  # the pipeline has an autoencoder
            filled.model.pretrained = _absolute(source)
            if described is None:
                _fill_channels(filled.model, pipeline, source)
        else:
            filled.model.pretrained = None
            _fill_without_pipeline(filled.model)
        _check_parts(filled.model)
        _fill_objective(filled, described or pipeline, node.architecture or source)
    return filled


def _absolute(source: str) -> str:
    """Return the absolute path of a folder or file; an id on the hub as it is."""
    path = Path(source).expanduser()
    return str(path.absolute()) if path.exists() else source


def _check_effects(model: DictConfig, source: str | None) -> None:
    """Raise UserError for options that have no effect together with the others."""
    if source is None:
        for name in ("revision", "variant"):
            if model[name] is not None:
                raise UserError(
                    f"has no effect without {KEY}",
                    key=f"model.{name}",
                    value=model[name],
                    remedy="Remove it.",
                )
    weights = OmegaConf.to_container(model.unet, resolve=False).get("weights")
    if model.architecture is not None and weights not in (None, "${model.pretrained}"):
        raise UserError(
            "has no effect with model.architecture, whose UNet starts with random weights",
            key="model.unet.weights",
            value=weights,
            remedy="Remove one of them.",
        )


def _fill_folders(
    model: DictConfig, folders: dict[str, str], source: str | None, path: Path
) -> None:
    """Set keys of the model that have the value `source`, as the yaml has them, to subfolders of
    `path`. The user may have named others.
    """
    for key, subfolder in folders.items():
        part, _, name = key.partition(".")
        if name in model[part] and OmegaConf.select(model, key) == source:
            OmegaConf.update(model, key, str(path / subfolder))


def _fill_channels(model: DictConfig, pipeline: PipelineFolder, source: str) -> None:
    """Let the model read what the UNet of a pipeline reads beside the latents.

    Raises UserError if the user chose other conditions: the weights of its input channels belong to
    this one. To a UNet without such channels any can be added.
    """
    name = channel_condition_of(pipeline)
    if name is None:
        return
    chosen = list(model.get("channels") or {})
    if chosen and chosen[0] != name:
        raise UserError(
            f"model/channels names {', '.join(chosen)}, but the first input channels of {source} "
            f"beside the latents are those of {name}",
            key="model/channels",
            remedy=f"Set model/channels=[{name}], or choose a pipeline without such channels.",
        )
    if not chosen:
        model.channels = _channels_of(name, pipeline)


def _channels_of(name: str, pipeline: PipelineFolder) -> dict[str, dict]:
    """Return the node of a channel condition, as in its file in configs/model/channels."""
    nodes = OmegaConf.load(config_dir() / "model" / "channels" / f"{name}.yaml")
    if "latent_channels" in nodes[name]:
        nodes[name].latent_channels = pipeline.autoencoder.latent_channels
    return OmegaConf.to_container(nodes)


def _fill_without_pipeline(model: DictConfig) -> None:
    """Let the text encoder start with random weights, and take the autoencoder of the data.

    The tokenizer is that of model.architecture, or CLIP's if it has none.
    """
    architecture = Path(model.architecture)
    tokenizer = architecture / TOKENIZER
    if not has_vocabulary(find_folder(model.architecture, "model.architecture") / TOKENIZER):
        tokenizer = SHIPPED_TOKENIZER
    _fill_folders(model, {"conditioner.architecture": TEXT_ENCODER}, None, architecture)
    _fill_folders(model, {"conditioner.tokenizer": "."}, None, tokenizer)
    _fill_folders(model, {"autoencoder.path": "."}, None, SHAPES_AUTOENCODER)
    if model.train is None:
        model.train = [UNET, TEXT_ENCODER]


def _fill_architecture(model: DictConfig, pretrained: str | None) -> Architecture:
    """Let the UNet have the architecture of model.architecture, with random weights.

    Returns that architecture. Raises UserError if there is none.
    """
    source = model.architecture
    key = "model.architecture"
    try:
        architecture = read_architecture(find_folder(source, key), source)
    except UserError as error:
        raise UserError(
            error.problem, key=key, value=source, remedy=f"Set {key} to another folder."
        ) from error
    _fill_folders(model, {"unet.architecture": UNET}, pretrained, Path(source))
    model.unet.weights = None
    return architecture


def _check_parts(model: DictConfig) -> None:
    """Set model.train to its default, and model.conditioner.trained to match it.

    Raises UserError if model.train names anything but parts that can be trained.
    """
    allowed = get_args(Part)
    train = [UNET] if model.train is None else list(model.train)
    has_random_text = model.conditioner.get("weights", "") is None
    if not train or any(part not in allowed for part in train) or UNET not in train:
        raise UserError(
            "must name the parts to train",
            key="model.train",
            value=train,
            allowed="[unet] or [unet,text_encoder]",
        )
    if has_random_text and TEXT_ENCODER not in train:
        raise UserError(
            "leaves out the text encoder, whose weights are random without model.pretrained",
            key="model.train",
            value=train,
            remedy="Set model.train=[unet,text_encoder], or model.pretrained.",
        )
    model.train = train
    if "trained" in model.conditioner:
        model.conditioner.trained = TEXT_ENCODER in train


def _fill_objective(config: DictConfig, described: Architecture, source: str) -> None:
    """Set schedule, modifiers and prediction as the folder says, unless the user has chosen."""
    if not config.get("schedule"):
        config.schedule = schedule_node(described, source)
        modifiers = modifier_nodes(described)
        if modifiers:
            chosen = config.get("modifiers") or OmegaConf.create({})
            config.modifiers = modifiers | OmegaConf.to_container(chosen, resolve=False)
    if not config.get("prediction"):
        config.prediction = prediction_node(described, source)


def check_image_size(config: DictConfig) -> None:
    """Raise UserError if a Stable Diffusion pipeline cannot draw pictures of this size."""
    size = OmegaConf.select(config, "data.image_size")
    is_pipeline = "pretrained" in (config.get("model") or {})
    if is_pipeline and isinstance(size, int) and size % SIDES:
        raise UserError(
            f"must be a multiple of {SIDES}: a Stable Diffusion pipeline draws no other sizes",
            key="data.image_size",
            value=size,
        )


def image_size_of_unet(model: DictConfig) -> int:
    """Return the side of the pictures that the UNet of a pipeline is made for, in pixels.

    Raises UserError if its config.json, or the size of the autoencoder, does not say.
    """
    key = "model.unet.architecture"
    folder = find_folder(model.unet.architecture, key)
    side = read_json(folder / "config.json", str(folder)).get("sample_size")
    downsampling = model.autoencoder.get("downsampling")
    if not isinstance(side, int) or not isinstance(downsampling, int):
        raise UserError(
            f"data.image_size is missing, and no single sample_size in {folder}/config.json says "
            "how large the pictures are",
            key="data.image_size",
            remedy="Set data.image_size.",
        )
    return side * downsampling


def modifier_nodes(pipeline: Architecture) -> dict[str, dict[str, Any]]:
    """Return the modifiers of the schedule in scheduler_config.json, by name."""
    if not pipeline.scheduler.get("rescale_betas_zero_snr"):
        return {}
    target = "sdtrain.schedules.modifiers.zero_terminal_snr"
    return {"zero_terminal_snr": {"_target_": target, "_partial_": True}}


def schedule_node(pipeline: Architecture, source: str) -> dict[str, Any]:
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
    class_name = str(scheduler.get("_class_name"))
    if class_name.startswith("FlowMatch"):  # has other keys
        raise _scheduler_error(source, f"_class_name={class_name}", "schedule")
    count = scheduler["num_train_timesteps"]
    if scheduler["use_flow_sigmas"]:
        if scheduler["flow_shift"] != 1:
            found = f"flow_shift={scheduler['flow_shift']!r}"
            raise _scheduler_error(source, found, "schedule")
        return _schedule("flow.flow", num_timesteps=count)
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


def prediction_node(pipeline: Architecture, source: str) -> dict[str, Any]:
    """Return the node of the prediction in scheduler_config.json. Raises UserError if it is none
    of sdtrain's.
    """
    scheduler = SCHEDULER_DEFAULTS | pipeline.scheduler
    name = scheduler["prediction_type"]
    needs_flow = name == "flow_prediction" and not scheduler["use_flow_sigmas"]
    if name not in PREDICTIONS or needs_flow:
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
    """Return a line for each of schedule and prediction that is not that of the pretrained UNet."""
    model = config["model"]
    if not isinstance(model.get("pretrained"), str) or model["architecture"] is not None:
        return []
    source = model["pretrained"]
    path = find_pipeline(source, model["revision"], model["variant"])
    pipeline = read_pipeline_folder(path, source, model["variant"])
    chosen = {
        "schedule": (config["schedule"], config.get("modifiers") or {}),
        "prediction": (config["prediction"], {}),
    }
    lines = []
    for group, (node, modifiers) in chosen.items():
        try:
            if group == "schedule":
                pretrained = (schedule_node(pipeline, source), modifier_nodes(pipeline))
            else:
                pretrained = (prediction_node(pipeline, source), {})
        except UserError:
            continue
        if (node, modifiers) != pretrained:
            lines.append(
                f"{group}={_name_of(node, modifiers)} replaces {_name_of(*pretrained)}, with which "
                f"{source} was trained."
            )
    return lines


def _name_of(node: dict, modifiers: dict) -> str:
    """Return a name such as scaled_linear+shift."""
    return "+".join([str(node["_target_"]).rpartition(".")[2], *modifiers])
