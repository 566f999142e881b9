"""Measures the convergence order of every sampler that adds no noise.

    python -m sdtrain.audit.orders [STEPS ...]

On the six-mode ring of sdtrain.diffusion.mixture with its exact denoiser, over grids even in
log_snr from -6 to 6 of schedule=linear, without the last step into data. Error: root mean square
against a Runge-Kutta walk; order: log2 of the errors' ratio when the steps double.
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
"""The log_snrs between which is walked."""

STEPS = (80, 160, 320, 640)


class NoiseDrawnError(Exception):
    """A sampler has asked for noise."""


def deterministic() -> dict[str, Sampler]:
    """Every sampler of configs/sampler that asks for no noise, by name."""
    found = {}
    nothing = torch.zeros(1, 2, 1, 1, dtype=torch.float64)
    for path in sorted((config_dir() / "sampler").glob("*.yaml")):
        node = yaml.safe_load(path.read_text())
        if not node or "_target_" not in node:
            continue
        sampler = build(node, "sampler")
        try:
            walk(sampler, nothing, 2)
        except NoiseDrawnError:
            continue
        found[path.stem] = sampler
    return found


def no_noise(step: int) -> Tensor:
    """Raises NoiseDrawnError: of a sampler that asks for noise nothing is measured."""
    raise NoiseDrawnError


@functools.cache
def truth(count: int, steps: int = 4000) -> tuple[Tensor, Tensor]:
    """Starting points [count, 2] at LOW, and where they arrive at HIGH. No code of the samplers.

    By the classical Runge-Kutta method, taken in ln r, along

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


def walk(sampler: Sampler, start: Tensor, steps: int) -> Tensor:
    """Where `steps` steps from LOW to HIGH arrive [N, 2], before the last denoising."""
    schedule = linear()
    ring = GaussianMixture.ring()
    grid = schedule.time_of(torch.linspace(LOW, HIGH, steps + 1, dtype=torch.float64))
    visited = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return ring.x0(x, *schedule.alpha_sigma(t, torch.float64))

    def keep(step: int, x: Tensor, x0: Tensor) -> None:
        visited.append(x)

    sampler(denoise, start.reshape(-1, 2, 1, 1), grid, schedule, no_noise, keep)
    return visited[-1].flatten(1)


def errors(sampler: Sampler, steps: list[int], count: int = 64) -> list[float]:
    """Root mean square error at each number of steps."""
    start, end = truth(count)
    return [(walk(sampler, start, number) - end).square().mean().sqrt().item() for number in steps]


def orders(values: list[float]) -> list[float]:
    """Of each two neighbouring errors, of which the second is of twice as many steps."""
    return [math.log2(coarse / fine) for coarse, fine in pairwise(values)]


def main() -> None:
    secure_streams()
    parser = argparse.ArgumentParser("python -m sdtrain.audit.orders")
    parser.add_argument("steps", nargs="*", type=int, default=list(STEPS), help="numbers of steps")
    steps = parser.parse_args().steps
    heads = [f"error, {number} steps" for number in steps]
    table = Table("sampler", *heads, "orders", title="convergence on the six-mode ring")
    for name, sampler in deterministic().items():
        measured = errors(sampler, steps)
        cells = [f"{value:.2e}" for value in measured]
        in_words = ", ".join(f"{order:.2f}" for order in orders(measured))
        table.add_row(name, *cells, in_words)
    Console().print(table)


if __name__ == "__main__":
    main()
