"""The conditions of a model: a list of them on the command line, and what does not fit them."""

import re
from collections.abc import Iterable

from sdtrain.errors import UserError
from sdtrain.paths import config_dir

CONDITIONER = "model/conditioner"
CHANNELS = "model/channels"
LIST = re.compile(r"\[[\w/ ,]*\]")
OWN_TEXT = re.compile(r"model=(stable_diffusion|sd15|sd21|small)")
"""Choices of a model whose text encoder is not an option of model/conditioner."""

DEPTH = "sdtrain.conditioning.depth.Depth"
INPAINTING = "sdtrain.conditioning.inpainting.Inpainting"
TWO_CONDITIONS = "sdtrain.diffusion.two_conditions"


def is_condition_list(key: str, value: str) -> bool:
    """Return whether `key=value` is a list of conditions, as in model/conditioner=[text,depth].

    Raises UserError for several lists, as in a sweep.
    """
    if key != CONDITIONER or "[" not in value:
        return False
    if LIST.fullmatch(value) is None:
        raise UserError(
            "is more than one list of conditions",
            key=CONDITIONER,
            value=value,
            remedy="In a sweep, vary the channel conditions alone: 'model/channels=[depth],[]'.",
        )
    return True


def split_conditions(value: str, words: Iterable[str]) -> list[str]:
    """Return the overrides that stand for model/conditioner=[text,depth].

    Conditions with a file in configs/model/channels become model/channels=[depth], the one other
    model/conditioner=text, which is `none` if there is no other. A model that brings its own text
    encoder, such as model=stable_diffusion, keeps it. Raises UserError for a condition that is
    named twice, for several that are no channel conditions, and for model/channels beside the list.

    Args:
        value: the list, as typed.
        words: all arguments.
    """
    typed = [word for word in words if word.lstrip("+").startswith(f"{CHANNELS}=")]
    if typed:
        raise UserError(
            f"and {typed[0]} both say which channel conditions there are",
            key=CONDITIONER,
            value=value,
            remedy="Name all conditions in one of them.",
        )
    names = [name.strip() for name in value.strip("[] ").split(",") if name.strip()]
    channels = []
    others = []
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"names {name} twice", key=CONDITIONER, value=value)
        is_channel = (config_dir() / CHANNELS / f"{name}.yaml").is_file()
        (channels if is_channel else others).append(name)
    if len(others) > 1:
        raise UserError(
            f"names {' and '.join(others)}, of which the UNet can attend to one only",
            key=CONDITIONER,
            value=value,
            remedy="Name one of them, beside conditions of model/channels.",
        )
    overrides = [f"{CHANNELS}=[{','.join(channels)}]"]
    has_own_text = any(OWN_TEXT.fullmatch(word) for word in words)
    if not (has_own_text and others == ["text"]):
        overrides.append(f"{CONDITIONER}={others[0] if others else 'none'}")
    return overrides


def check_conditions(config: dict, typed: set[str]) -> None:
    """Raise UserError for guidance over a condition that there is not, for depth maps that nothing
    reads, and for a cache of pictures that are masked anew at each visit.

    typed: the keys that the user typed.
    """
    channels = config["model"].get("channels") or {}
    guidance = config.get("guidance") or {}
    if guidance.get("_target_") == TWO_CONDITIONS and not channels:
        raise UserError(
            "guidance=two_conditions guides along a caption and a channel condition, but there is "
            "no such condition",
            key="guidance",
            remedy="Set guidance=classifier_free, or model/channels=[depth].",
        )
    _check_depth_is_read(config, typed)
    cache = config["data"].get("cache") or "off"
    masks = any(node.get("_target_") == INPAINTING for node in channels.values())
    if masks and cache != "off":
        raise UserError(
            "holds latents of whole pictures, but inpainting masks the pictures themselves",
            key="data.cache",
            value=cache,
            remedy="Set data.cache=off.",
        )


def _check_depth_is_read(config: dict, typed: set[str]) -> None:
    """Raise UserError for a typed key about depth maps if no condition reads them.

    Conditions of the user's own may read them.
    """
    nodes = list((config["model"].get("channels") or {}).values())
    if config["model"].get("conditioner"):
        nodes.append(config["model"]["conditioner"])
    for node in nodes:
        target = node.get("_target_", "sdtrain.")
        if target == DEPTH or not target.startswith("sdtrain."):
            return
    data = config["data"]
    if not data.get("_target_", "").startswith("sdtrain."):
        return
    values = {"data.depth": data.get("depth"), "data.depth_model": data.get("depth_model")}
    if nodes:  # an autoencoder has to know which pictures are depth maps
        values["data.columns.depth"] = (data.get("columns") or {}).get("depth")
    for key, value in values.items():
        if key in typed and value is not None:
            raise UserError(
                f"{key} has no effect: the model reads no depth maps",
                key=key,
                remedy="Set model/channels=[depth], or remove it.",
            )
