"""Count the work of a network from its layers; the count is the same on every machine."""

from collections.abc import Callable

from torch import Tensor, nn


def multiplications(net: nn.Module, call: Callable[[], object]) -> float:
    """Count the multiplications in the convolutions and linear layers of `net` while `call` runs.

    Each weight is used once at each position of the layer's output. Products outside such layers,
    as in attention, are not counted.
    """
    total = 0.0

    def count(layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        nonlocal total
        total += layer.weight.numel() * output.numel() / layer.weight.shape[0]

    handles = []
    for layer in net.modules():
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim > 1 and not isinstance(layer, nn.Embedding):
            handles.append(layer.register_forward_hook(count))
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return total
