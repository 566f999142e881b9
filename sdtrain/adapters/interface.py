"""The interface of an adapter: a few weights that are trained inside a frozen model."""

from typing import Any, ClassVar

from torch import nn


class Adapter:
    """Puts new weights into a model whose own weights stay as they are.

    A subclass is built from `configs/adapter/NAME.yaml`.
    """

    parts: ClassVar[frozenset[str]] = frozenset()
    """Which of "unet" and "conditioner" get new weights."""

    def attach(self, model: Any) -> list[nn.Parameter]:
        """Put the new weights into a `LatentDiffusion`, and return them.

        At first the model's output is what it was, unless the subclass says otherwise.
        """
        raise NotImplementedError


def networks_of(model: Any) -> dict[str, nn.Module]:
    """Return the networks of a `LatentDiffusion` that come from diffusers or transformers, by the
    names of diffusers' pipelines.
    """
    parts = {"unet": model.unet, "text_encoder": model.conditioner}
    return {name: part.net for name, part in parts.items() if hasattr(part, "net")}
