"""Every law of the noise: a function of its sample's draws, with the covariance that it claims."""

import numpy as np
import pytest
import yaml
from hydra.utils import instantiate

from sdtrain.diffusion.noise import Gaussian, InputPerturbation, MultiResolution, Offset
from sdtrain.errors import UserError
from sdtrain.paths import config_dir
from sdtrain.randomness import KeyedRandom

LAWS = {
    path.stem: yaml.safe_load(path.read_text())
    for path in sorted((config_dir() / "noise").glob("*.yaml"))
    if path.stem != "none"
}
SHAPE = (2, 5, 8)
COUNT = 20000


def drawn(law, count=COUNT, seed=0, shape=SHAPE):
    """(noise [N, C, h, w], what is added [N, C, h, w]) of the ordinals 0, 1, ..."""
    keyed = KeyedRandom(seed, "noise")
    pairs = [
        law(lambda shape, index, o=o: keyed.normal(o, shape, index), shape) for o in range(count)
    ]
    return tuple(
        np.stack([noise if which == 0 or added is None else added for noise, added in pairs])
        for which in (0, 1)
    )


@pytest.mark.parametrize("name", LAWS)
def test_keyed_by_ordinal_and_of_the_claimed_shape(name):
    law = instantiate(LAWS[name])
    (noise, added), again = drawn(law, 4), drawn(law, 4)
    assert noise.shape == added.shape == (4, *SHAPE)
    assert noise.dtype == added.dtype == np.float32
    assert np.array_equal(noise, again[0]) and np.array_equal(added, again[1])
    assert not np.array_equal(noise[0], noise[1])
    assert not np.array_equal(drawn(law, 1, seed=1)[0], noise[:1])
    assert abs(drawn(law, 3000)[0].mean()) < 4 * 1.5 / np.sqrt(
        3000
    )  # one shared normal a sample at worst


def covariance(values):
    """Of all elements of a sample with one another, [C h w, C h w]."""
    flat = values.reshape(len(values), -1).astype(np.float64)
    return flat.T @ flat / len(flat)


def close(measured, expected):
    """4.5 standard errors: a product of two normals of covariance S has variance S_ii S_jj +
    S_ij^2, and there are 3,000 of them.
    """
    spread = np.sqrt((np.outer(np.diag(expected), np.diag(expected)) + expected**2) / COUNT)
    return (np.abs(measured - expected) < 4.5 * spread).all()


def test_gaussian():
    noise, added = drawn(Gaussian())
    assert np.array_equal(noise, added)
    assert close(covariance(noise), np.eye(80))


def test_offset_adds_one_normal_per_channel():
    expected = np.eye(80) + 0.3**2 * np.kron(np.eye(2), np.ones((40, 40)))
    noise, _ = drawn(Offset(strength=0.3))
    assert close(covariance(noise), expected)
    assert not close(covariance(noise), np.eye(80))


def test_perturbation_reaches_the_input_alone():
    noise, added = drawn(InputPerturbation(gamma=0.5))
    assert np.array_equal(noise[:500], drawn(Gaussian(), 500)[0])  # what is to be predicted
    assert close(covariance(added - noise), 0.25 * np.eye(80))
    cross = (added - noise).reshape(COUNT, -1).T @ noise.reshape(COUNT, -1) / COUNT
    assert np.abs(cross).max() < 4.5 * 0.5 / np.sqrt(COUNT)


def test_multi_resolution_has_unit_variance_and_the_covariance_of_nested_squares():
    noise, _ = drawn(MultiResolution(discount=0.6))
    y, x = np.divmod(np.arange(40), 8)
    one = sum(
        0.36**k * ((y[:, None] >> k == y >> k) & (x[:, None] >> k == x >> k)) for k in range(4)
    ) / sum(0.36**k for k in range(4))
    assert close(covariance(noise), np.kron(np.eye(2), one))


@pytest.mark.parametrize(
    ("law", "bad"),
    [
        (Offset, {"strength": 0.0}),
        (InputPerturbation, {"gamma": -1.0}),
        (MultiResolution, {"discount": 1.0}),
    ],
)
def test_what_would_have_no_effect_is_refused(law, bad):
    with pytest.raises(UserError) as refused:
        law(**bad)
    assert refused.value.key == f"noise.{next(iter(bad))}"
