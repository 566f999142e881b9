"""Train and eval mode."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Puts a module and all below it into eval mode, and each back into its own mode afterwards."""
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        yield
    finally:
        # Parents first, and by `train`, which a network may have given more to do.
        for each, training in modes:
            if each.training != training:
                each.train(training)


def begin_training(module: nn.Module) -> None:
    """Calls `train`, as a training loop does before its first step: a network may put parts of
    itself into eval mode there. What is in eval mode already stays in it.
    """
    in_eval_mode = [each for each in module.modules() if not each.training]
    module.train()
    for each in in_eval_mode:
        each.training = False
