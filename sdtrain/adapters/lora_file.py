"""Files of LoRAs, as diffusers and programs with kohya's names read and write them."""

import json
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from peft import get_peft_model_state_dict
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

KOHYA_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
KOHYA_ENDS = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_magnitude_vector": "dora_scale",
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
    except (OSError, SafetensorError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise _error(path, key, f"cannot be read as safetensors: {reason}") from error
    if all(name.startswith(tuple(KOHYA_PREFIXES.values())) for name in state):
        found = _read_kohya(state, networks, path, key)
    else:
        found = _read_diffusers(state, metadata, path, key)
    if not any(found.values()):
        raise _error(path, key, "holds no LoRA")
    for name, layers in found.items():
        _check_fit(name, layers, networks.get(name), path, key)
    return found


def _read_kohya(state: dict[str, Tensor], networks: Networks, path: str, key: str) -> LoraLayers:
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
        for full_name, value in of_network.items():
            try:
                layer, end = _split(full_name)
            except ValueError as error:
                raise _error(path, key, f"holds {prefix}{error}, which is no LoRA") from error
            parts.setdefault(layer.removeprefix(TEXT_PREFIX), {})[end] = value
        alpha = metadata.get(f"{prefix}lora_alpha")
        patterns = metadata.get(f"{prefix}alpha_pattern") or {}
        found[name] = {}
        for layer, tensors in parts.items():
            of_layer = patterns.get(layer, alpha)
            found[name][layer] = _layer(tensors, of_layer, path, key)
    return found


def _layer(
    tensors: dict[str, Tensor], alpha: Tensor | float | None, path: str, key: str
) -> LoraLayer:
    """Return the update of a layer. Without alpha its scale is 1."""
    down, up, magnitude = (tensors.get(end) for end in KOHYA_ENDS)
    if down is None or up is None or len(tensors) != 2 + (magnitude is not None):
        raise _error(path, key, f"holds {', '.join(sorted(tensors))} for a layer, which is no LoRA")
    if magnitude is not None:
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
        if tuple(module.weight.shape[:2]) != shape:
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
