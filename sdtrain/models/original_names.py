"""Names of weights in the original release of Stable Diffusion, whose files hold all networks.

Does not import torch.
"""

import re
from collections.abc import Iterable
from typing import Any

UNET_PREFIX = "model.diffusion_model."
AUTOENCODER_PREFIX = "first_stage_model."
CLIP_PREFIX = "cond_stage_model.transformer.text_model."
"""Of the text encoder of Stable Diffusion 1.x."""
OPEN_CLIP_PREFIX = "cond_stage_model.model."
"""Of the text encoder of Stable Diffusion 2.x."""
OPEN_CLIP_WIDTH = 1024
"""Width of that text encoder. By it readers of such files know which of the two they hold."""

UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
"""{module of the UNet outside of its blocks: its original name}."""

UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
"""{module of a residual block of the UNet: its original name}."""

AUTOENCODER_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
"""{module of the autoencoder's attention: its original name}. There they are convolutions of one
pixel, with two more dimensions."""

OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
"""{module of a layer of the text encoder: its original name}, except for query, key and value."""

OPEN_CLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
"""{weight of the text encoder outside of its layers: its original name}."""


def unet_names(names: Iterable[str], config: dict[str, Any]) -> dict[str, str]:
    """Return {name: original name} of the weights of a UNet2DConditionModel.

    config: its config.json. Raises ValueError for a weight that the original layout cannot hold.
    """
    names = list(names)
    layers = config["layers_per_block"]
    if not isinstance(layers, int):
        raise ValueError(f"layers_per_block={layers}")
    originals = {}
    for name in names:
        match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)
        if match:
            side, block, kind, index, rest = match.groups()
            has_attention = any(n.startswith(f"{side}_blocks.{block}.attentions.") for n in names)
            place = _unet_place(side, int(block), kind, int(index), layers, has_attention)
            kind_of_rest = kind
        elif match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
            kind_of_rest, index, rest = match.groups()
            position = 2 * int(index) + (kind_of_rest == "attentions")
            place = f"middle_block.{position}"
        else:
            originals[name] = UNET_PREFIX + _renamed(name, UNET_ENDS)
            continue
        if kind_of_rest == "resnets":
            rest = _renamed(rest, UNET_RESNET)
        elif kind_of_rest in ("downsamplers", "upsamplers"):
            rest = rest.removeprefix("conv.")
        originals[name] = f"{UNET_PREFIX}{place}.{rest}"
    return originals


def _unet_place(
    side: str, block: int, kind: str, index: int, layers: int, has_attention: bool
) -> str:
    """Return the original name of a module in a down or up block, which are numbered throughout."""
    if side == "down":
        if kind == "downsamplers":
            return f"input_blocks.{(block + 1) * (layers + 1)}.0.op"
        position = 1 + block * (layers + 1) + index
        return f"input_blocks.{position}.{int(kind == 'attentions')}"
    if kind == "upsamplers":
        return f"output_blocks.{block * (layers + 1) + layers}.{1 + has_attention}.conv"
    return f"output_blocks.{block * (layers + 1) + index}.{int(kind == 'attentions')}"


def autoencoder_names(names: Iterable[str], config: dict[str, Any]) -> dict[str, str]:
    """Return {name: original name} of the weights of an AutoencoderKL. config: its config.json."""
    last = len(config["block_out_channels"]) - 1
    originals = {}
    for name in names:
        renamed = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        renamed = renamed.replace("downsamplers.0.conv", "downsample.conv")
        renamed = renamed.replace("upsamplers.0.conv", "upsample.conv")
        renamed = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", renamed)
        renamed = re.sub(r"down_blocks\.(\d+)", r"down.\1", renamed)
        match = re.fullmatch(r"(.*)up_blocks\.(\d+)\.(.*)", renamed)
        if match:  # counted from the finest
            before, block, rest = match.groups()
            renamed = f"{before}up.{last - int(block)}.{rest.replace('resnets', 'block')}"
        match = re.fullmatch(r"(.*)mid_block\.resnets\.(\d+)\.(.*)", renamed)
        if match:
            before, index, rest = match.groups()
            renamed = f"{before}mid.block_{int(index) + 1}.{rest}"
        match = re.fullmatch(r"(.*)mid_block\.attentions\.0\.(.*)", renamed)
        if match:
            before, rest = match.groups()
            renamed = f"{before}mid.attn_1.{_renamed(rest, AUTOENCODER_ATTENTION)}"
        originals[name] = AUTOENCODER_PREFIX + renamed
    return originals


def is_autoencoder_attention(original_name: str) -> bool:
    """Whether an original name is that of a weight matrix of the autoencoder's attention."""
    is_matrix = original_name.endswith(".weight") and not original_name.endswith("norm.weight")
    return (
        original_name.startswith(AUTOENCODER_PREFIX) and ".attn_1." in original_name and is_matrix
    )


def text_encoder_names(names: Iterable[str], width: int) -> dict[str, str]:
    """Return {name: original name} of the weights of a CLIPTextModel.

    With OPEN_CLIP_WIDTH the weights of query, key and value have one original name: there they are
    one matrix, in this order.
    """
    originals = {}
    for name in names:
        bare = name.removeprefix("text_model.")
        if width != OPEN_CLIP_WIDTH:
            originals[name] = CLIP_PREFIX + bare
            continue
        match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", bare)
        if not match:
            originals[name] = OPEN_CLIP_PREFIX + OPEN_CLIP_ENDS[bare]
            continue
        layer, rest = match.groups()
        joined = re.fullmatch(r"self_attn\.[qkv]_proj\.(weight|bias)", rest)
        rest = f"attn.in_proj_{joined[1]}" if joined else _renamed(rest, OPEN_CLIP_LAYER)
        originals[name] = f"{OPEN_CLIP_PREFIX}transformer.resblocks.{layer}.{rest}"
    return originals


def _renamed(name: str, modules: dict[str, str]) -> str:
    """Return a weight's name with its module renamed. Raises ValueError for an unknown module."""
    module, _, weight = name.rpartition(".")
    if module not in modules:
        raise ValueError(name)
    return f"{modules[module]}.{weight}"
