"""Measures the convergence order of every sampler of configs/sampler that adds no noise.

    python -m sdtrain.audit.orders [STEPS ...]

The data are the six-mode ring of sdtrain.diffusion.mixture with its exact denoiser; the grids are
even in log_snr from -6 to 6 of schedule=linear, without the last step into data. The error is the
root mean square distance from a Runge-Kutta solution; the order is the log2 of the ratio of two
errors when the number of steps doubles.
"""

import argparse
import functools
import math
from itertools import pairwise

import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sdtrain.config.build import build
from sdtrain.console import secure_streams
from sdtrain.diffusion.mixture import GaussianMixture
from sdtrain.paths import config_dir
from sdtrain.samplers import Sampler
from sdtrain.schedules.linear import linear

LOW = -6.0
HIGH = 6.0
"""The log_snr at which the samplers start, and at which they end."""

STEPS = (80, 160, 320, 640)


class NoiseDrawnError(Exception):
    """Raised when a sampler draws noise."""


def deterministic_samplers() -> dict[str, Sampler]:
    """Return {name: sampler} for the samplers of configs/sampler whose steps draw no noise."""
    samplers = {}
    start = torch.zeros(1, 2, 1, 1, dtype=torch.float64)
    for path in sorted((config_dir() / "sampler").glob("*.yaml")):
        node = yaml.safe_load(path.read_text())
        if not node or "_target_" not in node:
            continue
        sampler = build(node, "sampler")
        try:
            sampler_solution(sampler, start, 2)
        except NoiseDrawnError:
            continue
        samplers[path.stem] = sampler
    return samplers


def refuse_noise(step: int) -> Tensor:
    """Raise NoiseDrawnError: the order of a sampler that draws noise is not measured."""
    raise NoiseDrawnError


@functools.cache
def reference_solution(count: int, steps: int = 1000) -> tuple[Tensor, Tensor]:
    """Return (starting points [count, 2] at LOW, where the exact ODE takes them at HIGH, to
    1e-11).

    Uses no code of the samplers: the classical Runge-Kutta method in ln r, for

        dy / dr = eps, with y = x / alpha and r = sigma / alpha.
    """
    ring = GaussianMixture.ring()
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(count, 2, generator=generator, dtype=torch.float64)

    def slope(y: Tensor, log_r: float) -> Tensor:
        r = math.exp(log_r)
        alpha = torch.tensor(1 / math.sqrt(1 + r * r), dtype=torch.float64)
        return r * ring.epsilon(alpha * y, alpha, r * alpha)

    y = start * math.sqrt(1 + math.exp(-LOW))
    log_r = -LOW / 2
    h = (LOW - HIGH) / 2 / steps
    for _ in range(steps):
        k1 = slope(y, log_r)
        k2 = slope(y + h / 2 * k1, log_r + h / 2)
        k3 = slope(y + h / 2 * k2, log_r + h / 2)
        k4 = slope(y + h * k3, log_r + h)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        log_r += h
    return start, y / math.sqrt(1 + math.exp(-HIGH))


def sampler_solution(sampler: Sampler, start: Tensor, steps: int) -> Tensor:
    """Return the points [N, 2] at HIGH after `steps` steps from LOW, before the last denoising."""
    schedule = linear()
    ring = GaussianMixture.ring()
    grid = schedule.time_of(torch.linspace(LOW, HIGH, steps + 1, dtype=torch.float64))
    trajectory = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return ring.x0(x, *schedule.alpha_sigma(t, torch.float64))

    def keep(step: int, x: Tensor, x0: Tensor) -> None:
        trajectory.append(x)

    sampler(denoise, start.reshape(-1, 2, 1, 1), grid, schedule, refuse_noise, keep)
    return trajectory[-1].flatten(1)


def rms_errors(sampler: Sampler, steps: list[int], count: int = 64) -> list[float]:
    """Return the root mean square error for each number of steps."""
    start, end = reference_solution(count)
    errors = []
    for number in steps:
        distance = sampler_solution(sampler, start, number) - end
        errors.append(distance.square().mean().sqrt().item())
    return errors


def convergence_orders(errors: list[float]) -> list[float]:
    """Return the order between each two neighbouring errors; the steps double between them."""
    return [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]


def main() -> None:
    secure_streams()
    parser = argparse.ArgumentParser("python -m sdtrain.audit.orders")
    parser.add_argument("steps", nargs="*", type=int, default=list(STEPS), help="numbers of steps")
    steps = parser.parse_args().steps
    heads = [f"error, {number} steps" for number in steps]
    table = Table("sampler", *heads, "orders", title="convergence on the six-mode ring")
    for name, sampler in deterministic_samplers().items():
        errors = rms_errors(sampler, steps)
        cells = [f"{error:.2e}" for error in errors]
        orders = ", ".join(f"{order:.2f}" for order in convergence_orders(errors))
        table.add_row(name, *cells, orders)
    Console().print(table)


if __name__ == "__main__":
    main()
