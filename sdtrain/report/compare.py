"""Paired comparison of runs: differences picture by picture, and what can be told from them."""

import json
import math
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from sdtrain.errors import UserError
from sdtrain.evaluation.noise_level_error import (
    BITS,
    LEVELS,
    NoiseLevelErrors,
    bits_over,
    standard_error,
)
from sdtrain.runs.reader import RunRecord

# Quantiles .975 of Student's t by degrees of freedom.
T = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
    2.120,
    2.110,
    2.101,
    2.093,
    2.086,
)


def t_quantile(freedom: int) -> float:
    """.975; beyond the table by the first terms of its expansion in 1 / freedom (Abramowitz and Stegun 26.7.5), right to 1e-3."""
    z = 1.959964
    return (
        T[freedom - 1]
        if freedom <= len(T)
        else z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    )


@dataclass
class Difference:
    """bits of an arm minus the baseline's, with a 95 % interval; over: "pictures" or "seeds"."""

    mean: float
    half: float
    over: str
    spread: tuple[float, float] | None = None  # of two seeds, too few for an interval over them
    unpaired_half: float = (
        math.nan
    )  # what the interval over pictures were, had each arm its own pictures and noise

    @property
    def told(self) -> bool:
        """Whether it can be told from nothing at all; seeds that do not agree in its sign cannot."""
        return abs(self.mean) > self.half and (
            self.spread is None or self.spread[0] * self.spread[1] > 0
        )


@dataclass
class Arm:
    """Runs that differ by their seed alone. used: those whose seeds all arms have, or all where arms have none in common."""

    name: str
    runs: list[RunRecord]
    used: list[RunRecord]
    errors: Tensor  # [N, L], their mean, on the pictures that all arms have
    common: float  # bits over the levels that all arms' networks reach
    common_error: float
    difference: Difference | None = None

    @property
    def inside(self) -> Tensor:
        return self.runs[0].last.found.inside

    def mean(self, name: str) -> float:
        """Of NoiseLevelErrors.summary() over the runs used, on the pictures that all arms have."""
        found, count = [run.last.found for run in self.used], len(self.errors)
        each = [
            NoiseLevelErrors(one.errors[:count], one.linear[:count], one.inside).summary()[name]
            for one in found
        ]
        return sum(each) / len(each)


@dataclass
class Comparison:
    """arms: best first. inside [L]: the levels that all reach. refused: (run, why it cannot be compared). unfinished: runs not at their end."""

    arms: list[Arm]
    baseline: Arm | None
    inside: Tensor
    refused: list[tuple[RunRecord, str]] = field(default_factory=list)
    unfinished: list[RunRecord] = field(default_factory=list)

    @property
    def over(self) -> str:
        """What intervals are taken over."""
        return sides(self.arms[0], self.arms[-1])[2]


def compare(runs: list[RunRecord], baseline: str | None = None) -> Comparison:
    """baseline: a run's or an arm's name, else the first that can be compared. Raises UserError where that one cannot."""
    reasons = {id(run): unfit(run) for run in runs if run.state == "finished"}
    refused = [(run, reasons[id(run)]) for run in runs if reasons.get(id(run))]
    ready = [run for run in runs if id(run) in reasons and not reasons[id(run)]]
    comparison = Comparison(
        [],
        None,
        torch.zeros(len(BITS), dtype=torch.bool),
        refused,
        [run for run in runs if run.state != "finished"],
    )
    named = [run for run in runs if baseline in (run.name, without_seed(run.name))]
    if named and not any(run in ready for run in named):
        raise UserError(
            f"--baseline {baseline} cannot be compared: {reasons.get(id(named[0])) or named[0].state}. Choose another run."
        )
    if not ready:
        return comparison
    first, kept = next((run for run in ready if run in named), ready[0]), []
    comparison.inside = first.last.found.inside
    for run in ready:
        both = comparison.inside & run.last.found.inside
        if reason := run.last.same_ground(first.last):
            refused.append((run, f"{reason} than {first.name}"))
        elif both.sum() < 2:
            refused.append(
                (
                    run,
                    f"its schedule has not two noise levels in common with {first.name} and those between",
                )
            )
        else:
            kept.append(run)
            comparison.inside = both
    groups = grouped(kept)
    if (
        len(groups) == 1
    ):  # runs that differ by their seed alone, and nothing to compare them with: then with each other
        groups = {run.name: [run] for run in kept}
    seeds = (
        set.intersection(*({seed(run) for run in group} for group in groups.values()))
        if groups
        else set()
    )
    count, weights = (
        min((len(run.last.pictures) for run in kept), default=0),
        bits_over(comparison.inside),
    )
    for name, group in groups.items():
        used = [run for run in group if seed(run) in seeds] or group
        errors = torch.stack([run.last.found.errors[:count] for run in used]).mean(0)
        bits = errors @ weights
        comparison.arms.append(
            Arm(name, group, used, errors, bits.mean().item(), standard_error(bits))
        )
    comparison.baseline = next((arm for arm in comparison.arms if first in arm.runs), None)
    for arm in comparison.arms:
        if arm is not comparison.baseline:
            arm.difference = difference(arm, comparison.baseline, weights)
    comparison.arms.sort(key=lambda arm: arm.common)
    return comparison


def unfit(run: RunRecord) -> str | None:
    """Why a finished run has no number to compare."""
    if run.last is None:
        return "no noise-level validation (callbacks.noise_levels)"
    if run.last.images_seen < run.images_seen:
        return f"its last look at the noise levels was at {run.last.images_seen} of {run.images_seen} images"
    return None if run.last.found.errors.isfinite().all() else "errors that are not finite"


def seed(run: RunRecord) -> str:
    return str(run.config.get("seed"))


def grouped(runs: list[RunRecord]) -> dict[str, list[RunRecord]]:
    """{name: the runs of one arm}: of one configuration, and each of another seed. A seed for the second time is an arm of its own."""
    groups: dict[tuple[str, int], list[RunRecord]] = {}
    for run in runs:
        key = json.dumps(
            {key: value for key, value in run.config.items() if key != "seed"}, sort_keys=True
        )
        copy = sum(
            seed(run) == seed(each)
            for (other, _), group in groups.items()
            if other == key
            for each in group
        )
        groups.setdefault((key, copy), []).append(run)
    named: dict[str, list[RunRecord]] = {}
    for group in groups.values():
        name = group[0].name
        if len(group) > 1 and (name := without_seed(name)) == group[0].name:
            name += f" and {len(group) - 1} other seed{'s' if len(group) > 2 else ''}"
        named[f"{name}, again" if name in named else name] = group
    return named


def difference(arm: Arm, base: Arm, weights: Tensor) -> Difference:
    """Of runs with the same seeds, on the same pictures with the same noise: what both share cancels.

    From three seeds on the interval is over them, and so speaks of other trainings too; below, it is over validation pictures, and speaks of
    these trained networks. weights [L]: errors @ weights are bits.
    """
    mine, theirs, over = sides(arm, base)
    gaps, quantile = (mine - theirs) @ weights, t_quantile(max(1, len(mine) - 1))
    unpaired = quantile * math.hypot(*(standard_error(each @ weights) for each in (mine, theirs)))
    spread, pairs = None, paired(arm, base)
    if len(pairs) == 2:
        means = [((one - other) @ weights).item() for one, other in pairs]
        spread = min(means), max(means)
    return Difference(gaps.mean().item(), quantile * standard_error(gaps), over, spread, unpaired)


def paired(arm: Arm, base: Arm) -> list[tuple[Tensor, Tensor]]:
    """(mean errors [L] of a run of the one, of the other's of the same seed)."""
    count, others = len(arm.errors), {seed(run): run for run in base.used}
    mean = lambda run: run.last.found.errors[:count].mean(0)  # noqa: E731
    return [(mean(run), mean(others[seed(run)])) for run in arm.used if seed(run) in others]


def sides(arm: Arm, base: Arm) -> tuple[Tensor, Tensor, str]:
    """(errors [R, L] of both, row by row; what a row is: "seeds" where they share three or more, else "pictures")."""
    pairs = paired(arm, base)
    return (
        (arm.errors, base.errors, "pictures")
        if len(pairs) < 3
        else (*map(torch.stack, zip(*pairs, strict=True)), "seeds")
    )


def winners(comparison: Comparison) -> list[tuple[float, str | None]]:
    """(log_snr, the arm with the lowest error there, or None where it cannot be told from the next) at the levels that all reach."""
    found = []
    for place in comparison.inside.nonzero().flatten().tolist():
        best, *rest = sorted(comparison.arms, key=lambda arm: arm.errors[:, place].mean().item())
        following = rest[0] if rest else best
        theirs, mine, _ = sides(following, best)
        gap, pairs = (theirs - mine)[:, place], paired(following, best)
        agree = len(pairs) != 2 or all(
            one[place] > other[place] for one, other in pairs
        )  # as in Difference.told
        told = agree and gap.mean() > t_quantile(max(1, len(gap) - 1)) * standard_error(gap)
        found.append((LEVELS[place].item(), best.name if told else None))
    return found


def without_seed(name: str) -> str:
    return ",".join(part for part in name.split(",") if not part.startswith("seed=")) or name


def parting(one: RunRecord, other: RunRecord) -> tuple[int, int | None]:
    """(training losses over the same images that both have, images_seen at the first that is not the same, None where they never part)."""
    losses = []
    for run in (one, other):  # a line is the mean since the one before it
        lines = [
            (line["images_seen"], line["train/loss"]) for line in run.lines if "train/loss" in line
        ]
        losses.append(
            {(before, seen): loss for (before, _), (seen, loss) in pairwise([(0, None), *lines])}
        )
    both = sorted(losses[0].keys() & losses[1].keys())
    return len(both), next((span[1] for span in both if losses[0][span] != losses[1][span]), None)
