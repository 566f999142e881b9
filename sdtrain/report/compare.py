"""Paired comparison of runs: their arms, and the differences picture by picture."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sdtrain.errors import UserError
from sdtrain.evaluation.noise_level_error import (
    LEVELS,
    NoiseLevelErrors,
    bits_over,
    standard_error,
)
from sdtrain.report.record import MeasuredRun
from sdtrain.report.request import without_seed
from sdtrain.report.statistics import Difference, half_width, quantile_for


@dataclass
class Arm:
    """Runs that differ by their seed alone.

    used: those whose seeds all arms have, or all where arms have none in common.
    errors: [N, L], the mean over `used`, on the N pictures that all arms have.
    common: bits over the levels that all arms' networks reach; common_error: their standard error.
    difference: to the baseline; None for the baseline itself, and for an untrained arm.
    """

    name: str
    runs: list[MeasuredRun]
    used: list[MeasuredRun]
    errors: Tensor
    common: float
    common_error: float
    difference: Difference | None = None

    @property
    def inside(self) -> Tensor:
        """[L]: the levels that its network reaches."""
        return self.runs[0].last.found.inside

    @property
    def untrained(self) -> bool:
        """Whether the best linear denoiser, which needs no training, is better."""
        return self.mean("bits_saved") < 0

    def mean(self, name: str) -> float:
        """Of NoiseLevelErrors.summary() over the runs used, on the pictures that all arms have."""
        count = len(self.errors)
        total = 0.0
        for run in self.used:
            found = run.last.found
            shared = NoiseLevelErrors(found.errors[:count], found.linear[:count], found.inside)
            total += shared.summary()[name]
        return total / len(self.used)


@dataclass
class Comparison:
    """Arms that were compared with a baseline, and the runs that could not be.

    arms: best first, and untrained ones after all others.
    inside: [L], the levels that all arms' networks reach.
    refused: (run, why it cannot be compared).
    unfinished: runs that are not at their end.
    """

    arms: list[Arm]
    baseline: Arm | None
    inside: Tensor
    refused: list[tuple[MeasuredRun, str]] = field(default_factory=list)
    unfinished: list[MeasuredRun] = field(default_factory=list)

    @property
    def over(self) -> str:
        """What intervals are taken over."""
        return sides(self.arms[0], self.arms[-1])[2]


def compare(runs: list[MeasuredRun], baseline: str | None = None) -> Comparison:
    """Groups the runs by arm, and compares each arm with the baseline.

    baseline: a run's or an arm's name; None for the first arm that can be compared and is trained.
    Raises UserError where the baseline cannot.
    """
    no_level = torch.zeros(len(LEVELS), dtype=torch.bool)
    comparison = Comparison([], None, no_level)
    ready = []
    for run in runs:
        if run.state != "finished":
            comparison.unfinished.append(run)
        elif reason := unfit(run):
            comparison.refused.append((run, reason))
        else:
            ready.append(run)
    named = [run for run in runs if baseline in (run.name, without_seed(run.name))]
    named_and_ready = [run for run in ready if run in named]
    if named and not named_and_ready:
        raise _refused_baseline(baseline, named[0])
    if not ready:
        return comparison
    first = named_and_ready[0] if named_and_ready else ready[0]
    kept = _keep_comparable(ready, first, comparison)
    comparison.arms = _arms(kept, bits_over(comparison.inside))
    comparison.baseline = _baseline(comparison.arms, first, is_named=bool(named_and_ready))
    for arm in comparison.arms:
        if arm is not comparison.baseline and not arm.untrained:
            arm.difference = difference(arm, comparison.baseline, bits_over(comparison.inside))
    comparison.arms.sort(key=lambda arm: (arm.untrained, arm.common))
    return comparison


def _baseline(arms: list[Arm], first: MeasuredRun, *, is_named: bool) -> Arm:
    """The arm of the run `first`, or the first that is trained where nobody has named that one."""
    own = next(arm for arm in arms if first in arm.runs)
    if is_named or not own.untrained:
        return own
    return next((arm for arm in arms if not arm.untrained), own)


def _refused_baseline(baseline: str, run: MeasuredRun) -> UserError:
    reason = unfit(run) if run.state == "finished" else run.state
    return UserError(
        f"--baseline {baseline} cannot be compared: {reason}",
        key="--baseline",
        remedy="Choose another run.",
    )


def unfit(run: MeasuredRun) -> str | None:
    """Why a finished run has no number to compare."""
    if run.last is None:
        return "no noise-level validation (callbacks.noise_levels)"
    if run.last.images_seen < run.images_seen:
        seen = f"{run.last.images_seen} of {run.images_seen} images"
        return f"its last look at the noise levels was at {seen}"
    if not run.last.found.errors.isfinite().all():
        return "errors that are not finite"
    return None


def _keep_comparable(
    runs: list[MeasuredRun], first: MeasuredRun, comparison: Comparison
) -> list[MeasuredRun]:
    """Refuses runs that cannot be compared with `first`, and finds the levels all others reach."""
    kept = []
    comparison.inside = first.last.found.inside
    for run in runs:
        both = comparison.inside & run.last.found.inside
        reason = run.last.why_not_comparable(first.last)
        if reason:
            comparison.refused.append((run, f"{reason} than {first.name}"))
        elif both.sum() < 2:
            few = f"its schedule has not two noise levels in common with {first.name}"
            comparison.refused.append((run, f"{few} and those between"))
        else:
            kept.append(run)
            comparison.inside = both
    return kept


def _arms(runs: list[MeasuredRun], weights: Tensor) -> list[Arm]:
    """weights: [L], errors @ weights are bits."""
    groups = group_by_arm(runs)
    if len(groups) == 1:
        # Runs that differ by their seed alone are compared with each other, if with nothing else.
        groups = {run.name: [run] for run in runs}
    seeds = _common_seeds(groups.values())
    count = min((len(run.last.pictures) for run in runs), default=0)
    arms = []
    for name, group in groups.items():
        used = [run for run in group if run.seed in seeds] or group
        errors = torch.stack([run.last.found.errors[:count] for run in used]).mean(0)
        bits = errors @ weights
        arms.append(Arm(name, group, used, errors, bits.mean().item(), standard_error(bits)))
    return arms


def _common_seeds(groups: Iterable[list[MeasuredRun]]) -> set[str]:
    """Seeds that a run of each group has."""
    seeds = [{run.seed for run in group} for group in groups]
    return set.intersection(*seeds) if seeds else set()


def group_by_arm(runs: list[MeasuredRun]) -> dict[str, list[MeasuredRun]]:
    """{name: the runs of one arm}: of one configuration, and each of another seed.

    A seed for the second time is an arm of its own.
    """
    groups: dict[tuple[str, int], list[MeasuredRun]] = {}
    for run in runs:
        rest = {key: value for key, value in run.config.items() if key != "seed"}
        configuration = json.dumps(rest, sort_keys=True)
        copy = 0
        for (other, _), group in groups.items():
            if other == configuration:
                copy += [each.seed for each in group].count(run.seed)
        groups.setdefault((configuration, copy), []).append(run)
    named: dict[str, list[MeasuredRun]] = {}
    for group in groups.values():
        name = _arm_name(group)
        while name in named:
            name += ", again"
        named[name] = group
    return named


def _arm_name(group: list[MeasuredRun]) -> str:
    name = group[0].name
    others = len(group) - 1
    if not others:
        return name
    if without_seed(name) != name:
        return without_seed(name)
    return f"{name} and {others} other seed{'s' if others > 1 else ''}"


def difference(arm: Arm, base: Arm, weights: Tensor) -> Difference:
    """Difference of two arms, of runs with the same seeds: what both share cancels.

    From three seeds on the interval is over them, and so speaks of other trainings too; below, it
    is over validation pictures, and speaks of these trained networks. weights: [L], errors @
    weights are bits.
    """
    mine, theirs, over = sides(arm, base)
    gaps = (mine - theirs) @ weights
    alone = [standard_error(side @ weights) for side in (mine, theirs)]
    unpaired = quantile_for(len(mine)) * math.hypot(*alone)
    pairs = paired(arm, base)
    spread = None
    if len(pairs) == 2:
        means = [((one - other) @ weights).item() for one, other in pairs]
        spread = (min(means), max(means))
    return Difference(gaps.mean().item(), half_width(gaps), over, spread, unpaired)


def paired(arm: Arm, base: Arm) -> list[tuple[Tensor, Tensor]]:
    """(mean errors [L] of a run of the one, of the other's of the same seed)."""
    count = len(arm.errors)
    others = {run.seed: run for run in base.used}
    pairs = []
    for run in arm.used:
        if run.seed in others:
            mine = run.last.found.errors[:count].mean(0)
            theirs = others[run.seed].last.found.errors[:count].mean(0)
            pairs.append((mine, theirs))
    return pairs


def sides(arm: Arm, base: Arm) -> tuple[Tensor, Tensor, str]:
    """Errors [R, L] of both, row by row, and what a row is.

    It is "seeds" where they share three or more, else "pictures".
    """
    pairs = paired(arm, base)
    if len(pairs) < 3:
        return arm.errors, base.errors, "pictures"
    mine = torch.stack([one for one, _ in pairs])
    theirs = torch.stack([other for _, other in pairs])
    return mine, theirs, "seeds"


def winners(comparison: Comparison) -> list[tuple[float, str | None]]:
    """(log_snr, the arm with the lowest error there) at the levels that all reach.

    None instead of the arm where it cannot be told from the next.
    """
    found = []
    for place in comparison.inside.nonzero().flatten().tolist():
        best, *rest = _best_first(comparison.arms, place)
        following = rest[0] if rest else best
        told = _is_told_at(place, best, following)
        found.append((LEVELS[place].item(), best.name if told else None))
    return found


def _best_first(arms: list[Arm], place: int) -> list[Arm]:
    """By their mean error at one level."""
    return sorted(arms, key=lambda arm: arm.errors[:, place].mean().item())


def _is_told_at(place: int, best: Arm, following: Arm) -> bool:
    """As Difference.told, at one level."""
    theirs, mine, _ = sides(following, best)
    gap = (theirs - mine)[:, place]
    pairs = paired(following, best)
    agree = len(pairs) != 2 or all(one[place] > other[place] for one, other in pairs)
    return agree and bool(gap.mean() > half_width(gap))
