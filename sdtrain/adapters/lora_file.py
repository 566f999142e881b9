"""Files of LoRAs, as diffusers and programs with kohya's names read and write them."""

import json
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from peft import get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sdtrain.adapters.lora import NAME, UPDATABLE, LoraLayer, LoraLayers, Networks
from sdtrain.errors import UserError
from sdtrain.files import atomic_file, set_modes

FILE = "pytorch_lora_weights.safetensors"
"""Name of the file, as diffusers has it."""

METADATA = "lora_adapter_metadata"
"""Entry of the file's metadata in which diffusers stores the configuration of peft."""

TEXT_PREFIX = "text_model."
"""Prefix of the text encoder's layers in files, which transformers 5 has dropped."""

MAGNITUDE = "lora_magnitude_vector"
KOHYA_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
KOHYA_ENDS = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    MAGNITUDE: "dora_scale",
}

PEFT_ENDS = {kohya: end for end, kohya in KOHYA_ENDS.items()}


def write_lora(
    networks: Networks, folder: Path, layout: str, dtype: torch.dtype = torch.float32
) -> None:
    """Write the LoRA that networks have been trained with to FILE in a folder.

    layout: "diffusers", with peft's configuration in the metadata, or "kohya", with a tensor
    `alpha` for each layer. dtype: of the weights.

    Raises UserError if no network has a LoRA, OSError.
    """
    networks = {name: net for name, net in networks.items() if hasattr(net, "peft_config")}
    if not networks:
        raise UserError(
            "does not work: the run has learned no LoRA",
            key="format",
            value=layout,
            remedy="Set format=folder, or give a run with adapter=lora.",
        )
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "kohya":
        with atomic_file(folder / FILE) as temporary:
            save_file(_kohya_state(networks, dtype), temporary)
        return
    arguments = {}
    for name, network in networks.items():
        arguments[f"{name}_lora_layers"] = _peft_state(name, network, dtype)
        arguments[f"{name}_lora_adapter_metadata"] = network.peft_config[NAME].to_dict()
    StableDiffusionPipeline.save_lora_weights(folder, weight_name=FILE, **arguments)
    set_modes(folder)


def _peft_state(name: str, network: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the weights of a network's LoRA by peft's names, as files have them."""
    state = {}
    for key, value in get_peft_model_state_dict(network, adapter_name=NAME).items():
        if name == "text_encoder" and not key.startswith(TEXT_PREFIX):
            key = f"{TEXT_PREFIX}{key}"
        state[key] = value.to(dtype).contiguous()
    return state


def _kohya_state(networks: Networks, dtype: torch.dtype) -> dict[str, Tensor]:
    state = {}
    for name, network in networks.items():
        alpha = float(network.peft_config[NAME].lora_alpha)
        for key, value in _peft_state(name, network, dtype).items():
            layer, end = _split(key)
            layer = f"{KOHYA_PREFIXES[name]}{layer.replace('.', '_')}"
            if end == MAGNITUDE:
                value = value.reshape(-1, 1)  # broadcasts over the inputs
            state[f"{layer}.{KOHYA_ENDS[end]}"] = value
            state[f"{layer}.alpha"] = torch.tensor(alpha)
    return state


def _split(key: str) -> tuple[str, str]:
    """Return (layer, end) of a name of peft. Raises ValueError for one that is not of a LoRA."""
    key = key.removesuffix(".weight")
    layer, _, end = key.rpartition(".")
    if end in ("lora_A", "lora_B"):
        end = f"{end}.weight"
    if end not in KOHYA_ENDS:
        raise ValueError(key)
    return layer, end


def read_lora(path: str, key: str, networks: Networks) -> LoraLayers:
    """Return the updates of layers that a file holds.

    path: of the file, or of a folder that holds FILE. key: names the file, for errors. networks:
    those that are to be updated.

    Raises UserError for a file that cannot be read, that holds no LoRA, or one for other layers.
    """
    file = Path(path)
    if file.is_dir():
        file = file / FILE
    try:
        with safe_open(file, framework="pt") as content:
            metadata = json.loads((content.metadata() or {}).get(METADATA, "{}"))
            state = {name: content.get_tensor(name).float() for name in content.keys()}
            if not isinstance(metadata, dict):
                raise ValueError(f"its metadata {METADATA} are a {type(metadata).__name__}")
    except (OSError, SafetensorError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise _error(path, key, f"cannot be read as safetensors: {reason}") from error
    if not all(bool(value.isfinite().all()) for value in state.values()):
        raise _error(path, key, "holds numbers that are not finite")
    if any(name.startswith(tuple(KOHYA_PREFIXES.values())) for name in state):
        found = _read_kohya(state, networks, path, key)
    else:
        found = _read_diffusers(state, metadata, path, key)
    if not any(found.values()):
        raise _error(path, key, "holds no LoRA")
    for name, layers in found.items():
        _check_fit(name, layers, networks.get(name), path, key)
    return found


def _read_kohya(state: dict[str, Tensor], networks: Networks, path: str, key: str) -> LoraLayers:
    for name in state:
        if not name.startswith(tuple(KOHYA_PREFIXES.values())):
            raise _error(
                path, key, f"holds {name}, which is of no LoRA for Stable Diffusion 1 or 2"
            )
    found: LoraLayers = {}
    for name, prefix in KOHYA_PREFIXES.items():
        names = {}
        network = networks.get(name)
        for layer, _ in network.named_modules() if network is not None else ():
            names[layer.replace(".", "_")] = layer
        parts: dict[str, dict[str, Tensor]] = {}
        for full_name, value in state.items():
            if full_name.startswith(prefix):
                layer, _, end = full_name.removeprefix(prefix).partition(".")
                layer = layer.removeprefix(TEXT_PREFIX.replace(".", "_"))
                parts.setdefault(names.get(layer, layer), {})[end] = value
        found[name] = {}
        for layer, tensors in parts.items():
            alpha = tensors.pop("alpha", None)
            tensors = {PEFT_ENDS.get(end, end): value for end, value in tensors.items()}
            found[name][layer] = _layer(tensors, alpha, path, key)
    return found


def _read_diffusers(state: dict[str, Tensor], metadata: dict, path: str, key: str) -> LoraLayers:
    found: LoraLayers = {}
    for name in KOHYA_PREFIXES:
        prefix = f"{name}."
        of_network = {
            full_name.removeprefix(prefix): value
            for full_name, value in state.items()
            if full_name.startswith(prefix)
        }
        if not any("lora_A" in each for each in of_network):  # an earlier layout of diffusers
            convert = convert_unet_state_dict_to_peft
            if name == "text_encoder":
                convert = convert_state_dict_to_peft
            of_network = convert(of_network) if of_network else {}
        parts: dict[str, dict[str, Tensor]] = {}
        alphas = {}
        for full_name, value in of_network.items():
            if full_name.endswith(".alpha"):
                alphas[full_name.removesuffix(".alpha").removeprefix(TEXT_PREFIX)] = value
                continue
            try:
                layer, end = _split(full_name)
            except ValueError as error:
                raise _error(path, key, f"holds {prefix}{error}, which is no LoRA") from error
            parts.setdefault(layer.removeprefix(TEXT_PREFIX), {})[end] = value
        found[name] = {}
        for layer, tensors in parts.items():
            alpha = alphas.get(layer, _alpha_of_metadata(metadata, prefix, layer, tensors))
            found[name][layer] = _layer(tensors, alpha, path, key)
    return found


def _alpha_of_metadata(
    metadata: dict, prefix: str, layer: str, tensors: dict[str, Tensor]
) -> float | None:
    """Return the alpha of a layer in peft's configuration; None if it has none.

    With use_rslora the scale is alpha / sqrt(rank) in place of alpha / rank.
    """
    patterns = metadata.get(f"{prefix}alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(patterns, layer), metadata.get(f"{prefix}lora_alpha"))
    down = tensors.get("lora_A.weight")
    if alpha is not None and down is not None and metadata.get(f"{prefix}use_rslora"):
        alpha = alpha * len(down) ** 0.5
    return alpha


def _layer(
    tensors: dict[str, Tensor], alpha: Tensor | float | None, path: str, key: str
) -> LoraLayer:
    """Return the update of a layer. Without alpha its scale is 1."""
    down, up, magnitude = (tensors.get(end) for end in KOHYA_ENDS)
    if down is None or up is None or len(tensors) != 2 + (magnitude is not None):
        raise _error(path, key, f"holds {', '.join(sorted(tensors))} for a layer, which is no LoRA")
    if len(down) != up.shape[1]:
        raise _error(path, key, f"multiplies matrices of ranks {len(down)} and {up.shape[1]}")
    if magnitude is not None:
        if magnitude.shape[0] != len(up) or magnitude.numel() != len(up):
            raise _error(
                path,
                key,
                f"has magnitudes of shape {tuple(magnitude.shape)} for a layer of {len(up)} "
                "outputs, of which each needs one",
            )
        magnitude = magnitude.flatten()
    return LoraLayer(down, up, float(len(down) if alpha is None else alpha), magnitude)


def _check_fit(
    name: str, layers: dict[str, LoraLayer], network: nn.Module | None, path: str, key: str
) -> None:
    """Raise UserError if a network has not the layers, or has them in other sizes."""
    of_network = {} if network is None else dict(network.named_modules())
    for layer, update in layers.items():
        module = of_network.get(layer)
        module = getattr(module, "base_layer", module)
        if not isinstance(module, UPDATABLE):
            raise _error(path, key, f"updates {name}.{layer}, which this model has not", other=True)
        shape = (update.up.shape[0], update.down.shape[1])
        same_kind = update.down.ndim == update.up.ndim == module.weight.ndim
        if tuple(module.weight.shape[:2]) != shape or not same_kind:
            raise _error(
                path,
                key,
                f"updates {name}.{layer} as a layer of {shape[1]} inputs and {shape[0]} outputs, "
                f"which has {module.weight.shape[1]} and {module.weight.shape[0]} in this model",
                other=True,
            )


def _error(path: str, key: str, problem: str, *, other: bool = False) -> UserError:
    remedy = f"Set {key} to a file of sdtrain-export format=diffusers, or of another program."
    if other:
        problem += ": it was trained with another model"
        remedy = f"Set checkpoint to the model that it was trained with, or change {key}."
    return UserError(problem, key=key, value=path, remedy=remedy)
