"""Paired comparison of runs: differences picture by picture, and what can be told from them."""

import json
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sdtrain.metrics.noise_level_error import BITS, standard_error
from sdtrain.report.runs import RunRecord

# Quantiles .975 of Student's t by degrees of freedom.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)


def t_quantile(freedom: int) -> float:
    """.975; beyond the table by the first terms of its expansion in 1 / freedom (Abramowitz and Stegun 26.7.5), right to 1e-3."""
    z = 1.959964
    return T[freedom - 1] if freedom <= len(T) else z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


@dataclass
class Difference:
    """bits of an arm minus the baseline's, with a 95 % interval; over: "pictures" or "seeds". half is None where there is no interval."""

    mean: float
    half: float | None
    over: str
    spread: tuple[float, float] | None = None  # over seeds, where they are too few for an interval
    unpaired_half: float | None = None

    @property
    def told(self) -> bool:
        """Whether it can be told from nothing at all."""
        return self.half is not None and abs(self.mean) > self.half


@dataclass
class Arm:
    """Runs that differ by their seed alone."""

    name: str
    runs: list[RunRecord]
    common: float = math.nan  # bits over the levels that all arms' networks reach
    common_error: float = math.nan
    difference: Difference | None = None


@dataclass
class Comparison:
    """arms: best first. refused: (run, why it cannot be compared). unfinished: runs that are not at their end."""

    arms: list[Arm]
    baseline: Arm | None
    inside: Tensor
    refused: list[tuple[RunRecord, str]] = field(default_factory=list)
    unfinished: list[RunRecord] = field(default_factory=list)


def compare(runs: list[RunRecord], baseline: str | None = None) -> Comparison:
    """baseline: a run's or an arm's name, else the first that can be compared."""
    unfinished = [run for run in runs if run.state != "finished"]
    finished, refused = [run for run in runs if run.state == "finished"], []
    for run in [run for run in finished if run.last is None]:
        refused.append((run, "no noise-level validation (callbacks.noise_levels)"))
    ready = [run for run in finished if run.last is not None]
    if not ready:
        return Comparison([], None, torch.zeros(len(BITS), dtype=torch.bool), refused, unfinished)
    first = next((run for run in ready if baseline and (run.name == baseline or without_seed(run.name) == baseline)), ready[0])
    for run in ready:
        if reason := run.last.same_ground(first.last):
            refused.append((run, f"{reason} than {first.name}"))
    ready = [run for run in ready if run.last.same_ground(first.last) is None]
    inside = torch.stack([run.last.found.inside for run in ready]).all(0)
    arms: dict[str, Arm] = {}
    for run in ready:
        key = json.dumps(config_without_seed(run), sort_keys=True)
        arms.setdefault(key, Arm(without_seed(run.name), [])).runs.append(run)
    for arm in arms.values():
        if len(arm.runs) == 1:
            arm.name = arm.runs[0].name
        bits = torch.stack([common_bits(run, inside) for run in arm.runs]).mean(0) if same_pictures(arm.runs) else common_bits(arm.runs[0], inside)
        arm.common, arm.common_error = bits.mean().item(), standard_error(bits)
    base = next(arm for arm in arms.values() if first in arm.runs)
    for arm in arms.values():
        if arm is not base:
            arm.difference = difference(arm, base, inside)
    return Comparison(sorted(arms.values(), key=lambda arm: arm.common), base, inside, refused, unfinished)


def common_bits(run: RunRecord, inside: Tensor) -> Tensor:
    """Bits [N] by picture, over the levels that `inside` [L] names."""
    return (run.last.found.errors * inside) @ BITS


def same_pictures(runs: list[RunRecord]) -> bool:
    return len({len(run.last.pictures) for run in runs}) == 1


def difference(arm: Arm, base: Arm, inside: Tensor) -> Difference:
    """Of runs with the same seed, on the same pictures with the same noise: what both share cancels.

    From three common seeds on the interval is over them, and so speaks of other trainings too; below, it is over validation pictures, and
    speaks of these trained networks.
    """
    seeds = {run.config.get("seed"): run for run in base.runs}
    pairs = [(run, seeds[run.config.get("seed")]) for run in arm.runs if run.config.get("seed") in seeds] or [(arm.runs[0], base.runs[0])]
    per_pair, means = [], []
    for one, other in pairs:
        count = min(len(one.last.pictures), len(other.last.pictures))
        per_pair.append(common_bits(one, inside)[:count] - common_bits(other, inside)[:count])
        means.append(per_pair[-1].mean().item())
    count = min(map(len, per_pair))
    pictures = torch.stack([each[:count] for each in per_pair]).mean(0)
    mean = sum(means) / len(means)
    alone = [torch.stack([common_bits(pair[side], inside)[:count] for pair in pairs]).mean(0) for side in (0, 1)]
    unpaired = t_quantile(max(1, count - 1)) * math.hypot(*map(standard_error, alone))
    if len(pairs) >= 3:
        return Difference(mean, t_quantile(len(pairs) - 1) * standard_error(torch.tensor(means, dtype=torch.float64)), "seeds", unpaired_half=unpaired)
    half = t_quantile(max(1, count - 1)) * standard_error(pictures)
    return Difference(mean, half, "pictures", (min(means), max(means)) if len(means) > 1 else None, unpaired)


def config_without_seed(run: RunRecord) -> dict:
    return {key: value for key, value in run.config.items() if key != "seed"}


def without_seed(name: str) -> str:
    return ",".join(part for part in name.split(",") if not part.startswith("seed=")) or name


def parting(one: RunRecord, other: RunRecord) -> int | None:
    """images_seen of the first line at which the training losses of two runs are not the same; None where they never part."""
    losses = [dict(zip(*run.series("train/loss")[::2], strict=True)) for run in (one, other)]
    return next((seen for seen in sorted(losses[0].keys() & losses[1].keys()) if losses[0][seen] != losses[1][seen]), None)
