"""Parameter groups of the optimizer: a learning rate of its own for the text encoder, and weights
that do not decay.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from sdtrain.errors import UserError

TEXT_ENCODER_PREFIX = "conditioner."
"""Beginning of the names of the conditioner's parameters."""


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


def group_parameters(
    parameters: Mapping[str, nn.Parameter], settings: GroupSettings
) -> list[dict[str, Any]]:
    """Return the parameter groups for a torch optimizer: one, unless the settings ask for more.

    parameters: by name. Raises UserError if text_encoder_lr has no effect.
    """
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        own_rate = settings.text_encoder_lr is not None and name.startswith(TEXT_ENCODER_PREFIX)
        decays = settings.decay_norms_and_biases or parameter.ndim > 1
        group = groups.setdefault((own_rate, decays), {"params": []})
        group["params"].append(parameter)
        if own_rate:
            group["lr"] = settings.text_encoder_lr
        if not decays:
            group["weight_decay"] = 0.0
    has_own_rate = any(own_rate for own_rate, _ in groups)
    if settings.text_encoder_lr is not None and not has_own_rate:
        raise UserError(
            "has no effect: the text encoder is not trained",
            key="optimizer.text_encoder_lr",
            value=settings.text_encoder_lr,
            remedy="Set model.train=[unet,text_encoder], or remove it.",
        )
    return list(groups.values())
