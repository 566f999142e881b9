"""Switch modules between training mode and eval mode."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module and its submodules into eval mode, and restore each one's mode afterwards."""
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    module.eval()
    try:
        yield
    finally:
        # Parents first, and through `train`, which a network may override.
        for submodule, training in modes:
            if submodule.training != training:
                submodule.train(training)


def begin_training(module: nn.Module) -> None:
    """Call `train`, as a training loop does before its first step.

    A network may put some of its submodules into eval mode there. Submodules that are in eval mode
    already stay in it.
    """
    in_eval_mode = [submodule for submodule in module.modules() if not submodule.training]
    module.train()
    for submodule in in_eval_mode:
        submodule.training = False
