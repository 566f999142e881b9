"""Measures the convergence order of every deterministic sampler: python -m sdtrain.audit.orders [STEPS ...]

On the six-mode ring of sdtrain.diffusion.mixture with its exact denoiser, over grids even in log_snr from -6 to 6 of schedule=linear,
without the last step into data. Error: root mean square against a Runge-Kutta walk; order: log2 of the errors' ratio when the steps double.
"""

import functools
import math
import sys
from collections.abc import Callable

import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sdtrain.assemble.model import build
from sdtrain.diffusion.mixture import GaussianMixture
from sdtrain.paths import config_dir
from sdtrain.samplers import Sampler
from sdtrain.schedules.linear import linear

LOW, HIGH = -6.0, 6.0


def deterministic() -> dict[str, Sampler]:
    """Every sampler of configs/sampler that asks for no noise, by name."""
    found = {}
    for path in sorted((config_dir() / "sampler").glob("*.yaml")):
        node = yaml.safe_load(path.read_text())
        if node and "_target_" in node:
            try:
                sampler = build(node, "sampler")
                walk(sampler, torch.zeros(1, 2, 1, 1, dtype=torch.float64), 2)
                found[path.stem] = sampler
            except NotImplementedError:
                pass
    return found


def no_noise(step: int) -> Tensor:
    raise NotImplementedError


@functools.cache
def truth(count: int, steps: int = 4000) -> tuple[Tensor, Tensor]:
    """Starting points at LOW and where they arrive at HIGH, by the classical Runge-Kutta method along dy / dr = eps, y = x / alpha,
    r = sigma / alpha, taken in ln r. No code of the samplers."""
    ring, start = (
        GaussianMixture.ring(),
        torch.randn(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    )

    def slope(y: Tensor, log_r: float) -> Tensor:
        r = math.exp(log_r)
        alpha = torch.tensor(1 / math.sqrt(1 + r * r), dtype=torch.float64)
        return r * ring.epsilon(alpha * y, alpha, r * alpha)

    y, log_r, h = start * math.sqrt(1 + math.exp(-LOW)), -LOW / 2, (LOW - HIGH) / 2 / steps
    for _ in range(steps):
        k1 = slope(y, log_r)
        k2 = slope(y + h / 2 * k1, log_r + h / 2)
        k3 = slope(y + h / 2 * k2, log_r + h / 2)
        k4 = slope(y + h * k3, log_r + h)
        y, log_r = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), log_r + h
    return start, y / math.sqrt(1 + math.exp(-HIGH))


def walk(sampler: Sampler, start: Tensor, steps: int) -> Tensor:
    """Where `steps` steps from LOW to HIGH arrive, before the last denoising."""
    schedule, ring, seen = linear(), GaussianMixture.ring(), []
    grid = schedule.time_of(torch.linspace(LOW, HIGH, steps + 1, dtype=torch.float64))
    denoise: Callable = lambda x, t: ring.x0(x, *schedule.alpha_sigma(t, torch.float64))  # noqa: E731
    sampler(
        denoise,
        start.reshape(-1, 2, 1, 1),
        grid,
        schedule,
        no_noise,
        lambda step, x, x0: seen.append(x),
    )
    return seen[-1].flatten(1)


def errors(sampler: Sampler, steps: list[int], count: int = 64) -> list[float]:
    """Root mean square error at each number of steps."""
    start, end = truth(count)
    return [(walk(sampler, start, number) - end).square().mean().sqrt().item() for number in steps]


def orders(values: list[float]) -> list[float]:
    return [math.log2(coarse / fine) for coarse, fine in zip(values, values[1:], strict=False)]


def main() -> None:
    steps = [int(word) for word in sys.argv[1:]] or [80, 160, 320, 640]
    table = Table(
        "sampler",
        *(f"error, {number} steps" for number in steps),
        "orders",
        title="convergence on the six-mode ring",
    )
    for name, sampler in deterministic().items():
        measured = errors(sampler, steps)
        table.add_row(
            name,
            *(f"{value:.2e}" for value in measured),
            ", ".join(f"{order:.2f}" for order in orders(measured)),
        )
    Console().print(table)


if __name__ == "__main__":
    main()
