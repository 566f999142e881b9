"""Parameter groups of the optimizer: a learning rate of its own for the text encoder, weights that
do not decay, and the matrices of linear layers.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from sdtrain.errors import UserError

TEXT_ENCODER_PREFIX = "conditioner."
"""Beginning of the names of the conditioner's parameters."""

IS_MATRIX = "is_matrix"
"""Key of a group that says whether its parameters are matrices of linear layers."""


@dataclass(frozen=True, kw_only=True)
class GroupSettings:
    """Settings under `optimizer` that are not arguments of the optimizer itself.

    Args:
        text_encoder_lr: peak learning rate of the conditioner's parameters; None takes that of all
            others.
        decay_norms_and_biases: whether weight decay applies to parameters of one dimension, which
            are the weights of norms and all biases.
    """

    text_encoder_lr: float | None = None
    decay_norms_and_biases: bool = True

    def __post_init__(self) -> None:
        if self.text_encoder_lr is not None and self.text_encoder_lr < 0:
            raise UserError(
                "must be at least 0", key="optimizer.text_encoder_lr", value=self.text_encoder_lr
            )


def matrix_names(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> frozenset[str]:
    """Return the names of those parameters that are the weight of a linear layer of `module`.

    A weight that an embedding shares is an embedding.
    """
    linear = set()
    embeddings = set()
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            linear.add(id(layer.weight))
        elif isinstance(layer, nn.Embedding):
            embeddings.add(id(layer.weight))
    matrices = linear - embeddings
    return frozenset(name for name, parameter in parameters.items() if id(parameter) in matrices)


def group_parameters(
    parameters: Mapping[str, nn.Parameter],
    settings: GroupSettings,
    matrices: Collection[str] | None = None,
) -> list[dict[str, Any]]:
    """Return the parameter groups for a torch optimizer: one, unless the settings ask for more.

    parameters: by name. matrices: names of the parameters to keep in groups of their own; None
    makes no such groups. Raises UserError if text_encoder_lr has no effect.
    """
    groups: dict[tuple[bool, bool, bool], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        own_rate = settings.text_encoder_lr is not None and name.startswith(TEXT_ENCODER_PREFIX)
        decays = settings.decay_norms_and_biases or parameter.ndim > 1
        is_matrix = matrices is not None and name in matrices
        group = groups.setdefault((own_rate, decays, is_matrix), {"params": []})
        group["params"].append(parameter)
        if matrices is not None:
            group[IS_MATRIX] = is_matrix
        if own_rate:
            group["lr"] = settings.text_encoder_lr
        if not decays:
            group["weight_decay"] = 0.0
    has_own_rate = any(own_rate for own_rate, _, _ in groups)
    if settings.text_encoder_lr is not None and not has_own_rate:
        raise UserError(
            "has no effect: the text encoder is not trained",
            key="optimizer.text_encoder_lr",
            value=settings.text_encoder_lr,
            remedy="Set model.train=[unet,text_encoder], or remove it.",
        )
    return list(groups.values())
