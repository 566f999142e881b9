"""Each part of a network is put back into its own mode."""

import pytest
from torch import nn

from sdtrain.models.modes import begin_training, eval_mode


class Pinned(nn.Sequential):
    """Keeps its first part in eval mode, and counts the calls of `train`."""

    calls = 0

    def train(self, mode: bool = True) -> "Pinned":
        super().train(mode)
        self[0].eval()
        self.calls += 1
        return self


def network() -> nn.Sequential:
    """In eval mode: the second part with its first layer, but not the second layer."""
    made = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1), nn.Dropout()), Pinned())
    made[1].eval()
    made[1][1].train()
    made[2].extend([nn.Dropout(), nn.Dropout()])
    return made


def modes(module: nn.Module) -> dict[str, bool]:
    return {name: each.training for name, each in module.named_modules()}


def test_each_part_gets_its_own_mode_back():
    made = network()
    before = modes(made)
    with pytest.raises(KeyboardInterrupt), eval_mode(made):
        assert not any(modes(made).values())
        raise KeyboardInterrupt
    assert modes(made) == before
    assert made[2].calls == 2  # a network learns of both


def test_training_begins_with_train_and_wakes_nothing_up():
    made = network()
    before = modes(made)
    begin_training(made)
    assert made[2].calls == 1
    assert modes(made) == before | {"2.0": False}
    with eval_mode(made):
        pass
    assert modes(made) == before | {"2.0": False}
