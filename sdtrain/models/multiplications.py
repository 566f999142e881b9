"""The work of a network, counted from its layers: the same on every machine."""

from collections.abc import Callable

from torch import Tensor, nn


def multiplications(net: nn.Module, call: Callable[[], object]) -> float:
    """Multiplications of the convolutions and linear layers of `net` while `call` runs.

    Each weight is used once at each place of the layer's output. What has no such layers, as the
    products within attention, is not counted.
    """
    total = 0.0

    def count(layer: nn.Module, given: tuple, output: Tensor) -> None:
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
