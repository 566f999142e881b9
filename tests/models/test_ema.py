"""The average of the weights against its closed form, and the weights themselves, which it must
leave alone.
"""

import math

import numpy as np
import pytest
import torch
from torch import nn

from sdtrain.errors import UserError
from sdtrain.models.ema import EMA


def drifting(steps, seed=0):
    """(parameters, the values [steps + 1, 3] that they will have): 0 at the start, then after each
    step.
    """
    values = torch.randn(steps + 1, 3, generator=torch.Generator().manual_seed(seed))
    return {"w": nn.Parameter(values[0].clone())}, values


def average(values, decay):
    """decay_n = min(decay, (1 + n) / (10 + n)): p_0 weighs prod d_j, p_k weighs (1 - d_k) prod_{j >
    k} d_j.
    """
    decays = np.array([min(decay, (1 + n) / (10 + n)) for n in range(1, len(values))])
    later = np.append(
        np.cumprod(decays[::-1])[::-1], 1.0
    )  # later[k] = prod of the decays of the steps after k
    weights = np.append(later[0], (1 - decays) * later[1:])
    assert math.isclose(weights.sum(), 1)
    return weights @ values.double().numpy()


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 0.9999])
@pytest.mark.parametrize("steps", [1, 5, 300])
def test_closed_form(decay, steps):
    parameters, values = drifting(steps)
    ema = EMA(parameters, decay)
    for value in values[1:]:
        parameters["w"].data.copy_(value)
        ema.update(parameters)
    np.testing.assert_allclose(
        ema.weights["w"].numpy(), average(values, decay), rtol=0, atol=1e-6
    )  # float32: a few ulp, each forgotten like the rest
    assert ema.steps == steps


def test_it_does_not_follow_the_parameters_by_reference():
    parameters, values = drifting(1)
    ema = EMA(parameters, 0.9)
    parameters["w"].data.mul_(7)
    assert torch.equal(ema.weights["w"], values[0])
    assert not ema.weights["w"].requires_grad
    ema.update(parameters)
    assert torch.equal(parameters["w"], values[0] * 7)


def test_float32_whatever_the_parameters_are():
    """bfloat16 cannot hold 1 + 1e-3; the average moves by less than that a step, and arrives."""
    parameters = {"w": nn.Parameter(torch.ones(2, dtype=torch.bfloat16))}
    ema = EMA(parameters, 0.999)
    parameters["w"].data.fill_(2)
    for _ in range(20000):
        ema.update(parameters)
    assert ema.weights["w"].dtype == torch.float32
    torch.testing.assert_close(ema.weights["w"], torch.full((2,), 2.0), rtol=0, atol=1e-3)
    with ema.applied(parameters):
        assert parameters["w"].dtype == torch.bfloat16
        assert parameters["w"].tolist() == [2, 2]


def test_applied_lends_the_average_and_gives_the_very_same_tensors_back():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    net[2].bias.requires_grad_(False)
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    ema = EMA(trained, 0.5)
    torch.nn.init.ones_(net[0].weight)
    ema.update(trained)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    places = {name: value.data_ptr() for name, value in net.state_dict(keep_vars=True).items()}
    parameters = dict(net.named_parameters())
    averages = {name: value.clone() for name, value in ema.weights.items()}

    with pytest.raises(KeyboardInterrupt), ema.applied(trained):
        for name, value in net.state_dict().items():
            expected = (
                averages[name] if name in trained else before[name]
            )  # the frozen bias, the running mean, the integer counter
            assert torch.equal(value, expected), name
        assert not torch.equal(net[0].weight, before["0.weight"])
        raise KeyboardInterrupt  # given back on this way out too

    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert {
        name: value.data_ptr() for name, value in net.state_dict(keep_vars=True).items()
    } == places
    assert all(p is parameters[name] for name, p in net.named_parameters())
    assert all(torch.equal(ema.weights[name], value) for name, value in averages.items())
    assert not {"1.num_batches_tracked", "1.running_mean", "2.bias"} & ema.weights.keys()


def test_state_round_trip(tmp_path):
    """Through a file of plain tensors, and then the averages go on as one, bit for bit: the step
    counter is part of the state.
    """
    parameters, values = drifting(12)
    ema = EMA(parameters, 0.9)
    other = EMA({"w": nn.Parameter(torch.zeros(3))}, 0.9)
    for step, value in enumerate(values[1:]):
        parameters["w"].data.copy_(value)
        ema.update(parameters)
        if step == 4:
            torch.save(ema.state_dict(), tmp_path / "ema.pt")
            state = torch.load(tmp_path / "ema.pt", weights_only=True)
            other.load_state_dict(state)
            assert torch.equal(other.weights["w"], ema.weights["w"])
        elif step > 4:
            other.update(parameters)
    assert other.steps == ema.steps == 12
    assert torch.equal(other.weights["w"], ema.weights["w"])


@pytest.mark.parametrize("names", [["w"], ["a", "w", "z"], ["a"]])
def test_an_average_of_another_model_is_refused(names):
    ema = EMA({name: nn.Parameter(torch.zeros(2)) for name in ("a", "w")}, 0.9)
    stored = EMA({name: nn.Parameter(torch.ones(2)) for name in names}, 0.9).state_dict()
    with pytest.raises(ValueError, match=min({"a", "w"} ^ set(names))):
        ema.load_state_dict(stored)
    assert not any(value.any() for value in ema.weights.values())


@pytest.mark.parametrize("decay", [1.0, 1.5, -0.1, float("nan")])
def test_refused_decay(decay):
    with pytest.raises(UserError) as refused:
        EMA({}, decay)
    assert refused.value.key == "callbacks.ema.decay"
