"""Low-rank updates of a frozen model's attention (Hu et al. 2022, "LoRA"), with peft."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer as PeftLayer
from torch import Tensor, nn

from sdtrain.adapters.interface import Adapter
from sdtrain.errors import UserError

NAME = "default"
"""Of the adapter inside peft."""

UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")

UPDATABLE = (nn.Linear, nn.Conv2d)
"""Layers that can be updated."""

NAMES_TOLD = 20
"""Most layers that an error names."""


Networks = Mapping[str, nn.Module]
"""{"unet" and "text_encoder": network}, the names of diffusers' pipelines."""


@dataclass(frozen=True)
class LoraLayer:
    """The update of one layer: its weight changes by alpha / rank up down.

    down: [rank, ...]. up: [..., rank]. magnitude: of the columns, for DoRA; None without it.
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]


LoraLayers = dict[str, dict[str, LoraLayer]]
"""{name of a network: {name of a layer: its update}}."""


class Lora(Adapter):
    """Adds alpha / rank B A to the weights of chosen layers; B begins at 0.

    Args:
        rank: of the updates.
        alpha: their scale is alpha / rank; None takes the rank, for a scale of 1.
        targets: ends of the names of the UNet's layers that are updated.
        text_encoder: whether the attention of the text encoder is updated too.
        dora: whether the length of each weight is trained apart from its direction (Liu et al.
            2024, "DoRA").

    Raises UserError for values out of range.
    """

    def __init__(
        self,
        *,
        rank: int,
        alpha: float | None = None,
        targets: Sequence[str] = UNET_TARGETS,
        text_encoder: bool = False,
        dora: bool = False,
    ) -> None:
        if rank < 1:
            raise UserError("must be at least 1", key="adapter.rank", value=rank)
        if alpha is not None and alpha <= 0:
            raise UserError("must be above 0", key="adapter.alpha", value=alpha)
        if dora and text_encoder:
            raise UserError(
                "cannot be combined with adapter.text_encoder=true: diffusers reads no DoRA of a "
                "text encoder",
                key="adapter.dora",
                value=True,
                remedy="Remove one of them.",
            )
        self.rank = rank
        self.alpha = float(rank if alpha is None else alpha)
        self.targets = list(targets)
        self.text_encoder = text_encoder
        self.dora = dora
        self.parts = frozenset({"unet", "conditioner"} if text_encoder else {"unet"})

    def attach(self, model: Any) -> list[nn.Parameter]:
        """Put the updates into the layers, and return their weights.

        Raises UserError if no layer has such a name.
        """
        trained = self._inject(model.unet.net, self.targets, "adapter.targets")
        if self.text_encoder:
            model.conditioner.frozen = False
            trained += self._inject(model.conditioner.net, TEXT_TARGETS, "adapter.text_encoder")
        return trained

    def _inject(self, network: nn.Module, targets: Sequence[str], key: str) -> list[nn.Parameter]:
        _check_targets(network, targets, key)
        before = set(network.parameters())
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=list(targets),
            use_dora=self.dora,
            init_lora_weights=True,
        )
        inject_adapter_in_model(config, network, NAME)
        return [parameter for parameter in network.parameters() if parameter not in before]


def _check_targets(network: nn.Module, targets: Sequence[str], key: str) -> None:
    """Raise UserError, which names the key, if an end belongs to no layer that can be updated."""
    names = [name for name, layer in network.named_modules() if isinstance(layer, UPDATABLE)]
    for end in targets:
        if not any(f".{name}".endswith(f".{end}") for name in names):
            raise UserError(
                f"matches no layer with {end!r}; there are layers that end in "
                f"{', '.join(_ends(names))}",
                key=key,
                value=list(targets),
            )


def _ends(names: Sequence[str]) -> list[str]:
    """Return up to NAMES_TOLD ends of names of layers, in order."""
    ends = set()
    for name in names:
        parts = name.split(".")
        ends.add(".".join(parts[-2:] if parts[-1].isdecimal() else parts[-1:]))
    return sorted(ends)[:NAMES_TOLD]


@torch.no_grad()
def add_lora(networks: Networks, updates: LoraLayers, name: str, weight: float) -> None:
    """Add updates to the layers of networks, beside those that they have.

    name: of the LoRA inside peft. weight: by which the updates are multiplied.
    """
    for network_name, layers in updates.items():
        if layers:
            _add_to_network(networks[network_name], layers, name, weight)


def _add_to_network(
    network: nn.Module, layers: dict[str, LoraLayer], name: str, weight: float
) -> None:
    first = next(iter(layers.values()))
    config = LoraConfig(
        r=first.rank,
        lora_alpha=first.alpha,
        rank_pattern={f"^{layer}": update.rank for layer, update in layers.items()},
        alpha_pattern={f"^{layer}": update.alpha for layer, update in layers.items()},
        target_modules=list(layers),
        use_dora=any(update.magnitude is not None for update in layers.values()),
    )
    with warnings.catch_warnings():
        # That there are several adapters, which is what is asked for.
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        inject_adapter_in_model(config, network, name)
    for module in network.modules():
        if isinstance(module, PeftLayer):
            module.set_adapter(list(module.lora_A), inference_mode=True)
    for layer, update in layers.items():
        module = network.get_submodule(layer)
        module.lora_A[name].weight.copy_(update.down)
        module.lora_B[name].weight.copy_(update.up)
        if update.magnitude is not None:
            module.lora_magnitude_vector[name].weight.copy_(update.magnitude)
        module.set_scale(name, weight)
