"""Paired comparison of runs: groups them into arms and compares the arms picture by picture."""

import json
import math
from collections import Counter
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
from sdtrain.report.statistics import (
    Difference,
    confidence_half_width,
    standard_errors_to_95_percent,
)


@dataclass
class Arm:
    """Runs that differ only by their seed.

    runs_used: those whose seed every arm has, or all runs where the arms share no seed.
    errors: [N, L], the mean over `runs_used`, on the N pictures that all arms have.
    common_bits: bits per dimension over the levels that all arms' schedules reach.
    common_bits_error: the standard error of `common_bits`.
    difference: to the baseline; None for the baseline itself and for an untrained arm.
    """

    name: str
    runs: list[MeasuredRun]
    runs_used: list[MeasuredRun]
    errors: Tensor
    common_bits: float
    common_bits_error: float
    difference: Difference | None = None

    @property
    def reached_levels(self) -> Tensor:
        """Mask [L] of the noise levels that this arm's schedule reaches."""
        return self.runs[0].last_validation.result.inside

    @property
    def is_untrained(self) -> bool:
        """Whether the arm is worse than the best linear denoiser, which needs no training."""
        return self.mean_summary("bits_saved") < 0

    def mean_summary(self, name: str) -> float:
        """Return one number of NoiseLevelErrors.summary(), averaged over `runs_used`.

        It is taken on the pictures that all arms have.
        """
        count = len(self.errors)
        total = 0.0
        for run in self.runs_used:
            result = run.last_validation.result
            on_common_pictures = NoiseLevelErrors(
                result.errors[:count], result.linear[:count], result.inside
            )
            total += on_common_pictures.summary()[name]
        return total / len(self.runs_used)


@dataclass
class Comparison:
    """Arms compared with a baseline, and the runs that are left out.

    arms: best first, untrained ones after all others.
    common_levels: mask [L] of the noise levels that all arms' schedules reach.
    not_comparable: (run, the reason).
    unfinished: runs that have not reached their end.
    """

    arms: list[Arm]
    baseline: Arm | None
    common_levels: Tensor
    not_comparable: list[tuple[MeasuredRun, str]] = field(default_factory=list)
    unfinished: list[MeasuredRun] = field(default_factory=list)

    @property
    def samples(self) -> str:
        """What the intervals are taken over: "pictures" or "seeds"."""
        return paired_errors(self.arms[0], self.arms[-1])[2]


def compare(runs: list[MeasuredRun], baseline: str | None = None) -> Comparison:
    """Group the runs into arms and compare each arm with the baseline.

    baseline: the name of a run or an arm; None for the first arm that is comparable and trained.
    Raises UserError if the named baseline cannot be compared.
    """
    no_level = torch.zeros(len(LEVELS), dtype=torch.bool)
    comparison = Comparison([], None, no_level)
    candidates = []
    for run in runs:
        if run.state != "finished":
            comparison.unfinished.append(run)
        elif reason := _reason_without_result(run):
            comparison.not_comparable.append((run, reason))
        else:
            candidates.append(run)
    named = [run for run in runs if baseline in (run.name, without_seed(run.name))]
    named_candidates = [run for run in named if run in candidates]
    if named and not named_candidates:
        raise _baseline_error(baseline, named[0])
    if not candidates:
        return comparison
    reference = named_candidates[0] if named_candidates else candidates[0]
    comparable = _keep_comparable(candidates, reference, comparison)
    bit_weights = bits_over(comparison.common_levels)
    comparison.arms = _make_arms(comparable, bit_weights)
    comparison.baseline = _choose_baseline(
        comparison.arms, reference, is_named=bool(named_candidates)
    )
    for arm in comparison.arms:
        if arm is not comparison.baseline and not arm.is_untrained:
            arm.difference = difference(arm, comparison.baseline, bit_weights)
    comparison.arms.sort(key=lambda arm: (arm.is_untrained, arm.common_bits))
    return comparison


def _choose_baseline(arms: list[Arm], reference: MeasuredRun, *, is_named: bool) -> Arm:
    """Return the arm of `reference`; if the user named no baseline, the first trained arm."""
    own = next(arm for arm in arms if reference in arm.runs)
    if is_named or not own.is_untrained:
        return own
    return next((arm for arm in arms if not arm.is_untrained), own)


def _baseline_error(baseline: str, run: MeasuredRun) -> UserError:
    reason = _reason_without_result(run) if run.state == "finished" else run.state
    return UserError(
        f"--baseline {baseline} cannot be compared: {reason}",
        key="--baseline",
        remedy="Choose another run.",
    )


def _reason_without_result(run: MeasuredRun) -> str | None:
    """Return why a finished run has no result to compare, or None where it has one."""
    validation = run.last_validation
    if validation is None:
        return (
            "no noise-level validation (callbacks.noise_levels.every; in a short run looks.share)"
        )
    if validation.images_seen < run.images_seen:
        seen = f"{validation.images_seen} of {run.images_seen} images"
        return f"its last noise-level validation was at {seen}"
    if not validation.result.errors.isfinite().all():
        return "errors that are not finite"
    return None


def _keep_comparable(
    runs: list[MeasuredRun], reference: MeasuredRun, comparison: Comparison
) -> list[MeasuredRun]:
    """Return the runs that are comparable with `reference`.

    Sets comparison.common_levels to the levels that all of them reach, and adds the other runs to
    comparison.not_comparable.
    """
    comparable = []
    comparison.common_levels = reference.last_validation.result.inside
    for run in runs:
        levels = comparison.common_levels & run.last_validation.result.inside
        differing = run.last_validation.difference_from(reference.last_validation)
        if differing:
            reason = f"not the same {differing} as {reference.name}"
            comparison.not_comparable.append((run, reason))
        elif levels.sum() < 2:
            reason = (
                "its schedule shares fewer than two noise levels with "
                f"{reference.name} and the runs compared before it"
            )
            comparison.not_comparable.append((run, reason))
        else:
            comparable.append(run)
            comparison.common_levels = levels
    return comparable


def _make_arms(runs: list[MeasuredRun], bit_weights: Tensor) -> list[Arm]:
    """Group runs into arms. bit_weights: [L], so that errors @ bit_weights are bits."""
    groups = group_by_arm(runs)
    if len(groups) == 1:
        # With nothing else to compare, runs that differ only by their seed are compared with each
        # other.
        groups = {run.name: [run] for run in runs}
    seeds = _common_seeds(groups.values())
    count = min((len(run.last_validation.picture_hashes) for run in runs), default=0)
    arms = []
    for name, group in groups.items():
        used = [run for run in group if run.seed in seeds] or group
        errors = _mean_errors(used, count)
        bits = errors @ bit_weights
        arms.append(Arm(name, group, used, errors, bits.mean().item(), standard_error(bits)))
    return arms


def _mean_errors(runs: list[MeasuredRun], count: int) -> Tensor:
    """Return the errors [count, L] on the first pictures, averaged over the runs."""
    errors = []
    for run in runs:
        errors.append(run.last_validation.result.errors[:count])
    return torch.stack(errors).mean(0)


def _common_seeds(groups: Iterable[list[MeasuredRun]]) -> set[str]:
    """Return the seeds that every group has a run of."""
    seeds_of_groups = []
    for group in groups:
        seeds_of_groups.append({run.seed for run in group})
    return set.intersection(*seeds_of_groups) if seeds_of_groups else set()


def group_by_arm(runs: list[MeasuredRun]) -> dict[str, list[MeasuredRun]]:
    """Return {arm name: its runs}: runs of one configuration, each with another seed.

    A second run of the same configuration and seed starts an arm of its own.
    """
    groups: dict[tuple[str, int], list[MeasuredRun]] = {}
    seen: Counter[tuple[str, str]] = Counter()
    for run in runs:
        config = dict(run.config)
        config.pop("seed", None)
        configuration = json.dumps(config, sort_keys=True)
        earlier_runs = seen[configuration, run.seed]
        seen[configuration, run.seed] += 1
        groups.setdefault((configuration, earlier_runs), []).append(run)
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


def difference(arm: Arm, base: Arm, bit_weights: Tensor) -> Difference:
    """Return the paired difference `arm - base` in bits, with its 95 % confidence interval.

    Pairing removes the variation that the arms have in common. With three or more common seeds,
    the interval is over seeds and holds for new trainings as well; with fewer, it is over
    validation pictures and holds for these trained networks only.

    bit_weights: [L], one per noise level; `errors @ bit_weights` gives bits.
    """
    arm_errors, base_errors, samples = paired_errors(arm, base)
    gaps = (arm_errors - base_errors) @ bit_weights
    arm_error = standard_error(arm_errors @ bit_weights)
    base_error = standard_error(base_errors @ bit_weights)
    unpaired_error = math.hypot(arm_error, base_error)
    pairs = pairs_by_seed(arm, base)
    seed_range = None
    if len(pairs) == 2:
        means = []
        for arm_mean, base_mean in pairs:
            means.append(((arm_mean - base_mean) @ bit_weights).item())
        seed_range = (min(means), max(means))
    return Difference(
        mean=gaps.mean().item(),
        half_width=confidence_half_width(gaps),
        samples=samples,
        seed_range=seed_range,
        unpaired_half_width=standard_errors_to_95_percent(len(arm_errors)) * unpaired_error,
    )


def pairs_by_seed(arm: Arm, base: Arm) -> list[tuple[Tensor, Tensor]]:
    """Return, for each common seed, the mean errors [L] of the arm's run and of the base's run."""
    count = len(arm.errors)
    base_runs = {run.seed: run for run in base.runs_used}
    pairs = []
    for run in arm.runs_used:
        if run.seed in base_runs:
            arm_mean = run.last_validation.result.errors[:count].mean(0)
            base_mean = base_runs[run.seed].last_validation.result.errors[:count].mean(0)
            pairs.append((arm_mean, base_mean))
    return pairs


def paired_errors(arm: Arm, base: Arm) -> tuple[Tensor, Tensor, str]:
    """Return the errors [R, L] of both arms, paired row by row, and what a row is.

    Rows are "seeds" where the arms share three or more, otherwise "pictures".
    """
    pairs = pairs_by_seed(arm, base)
    if len(pairs) < 3:
        return arm.errors, base.errors, "pictures"
    arm_errors, base_errors = zip(*pairs, strict=True)
    return torch.stack(arm_errors), torch.stack(base_errors), "seeds"


def winners(comparison: Comparison) -> list[tuple[float, str | None]]:
    """Return (log_snr, name of the arm with the lowest error there) for each common level.

    The name is None where the difference to the second best arm is not significant.
    """
    by_level = []
    for index in comparison.common_levels.nonzero().flatten().tolist():
        ordered = sorted(comparison.arms, key=lambda arm: arm.errors[:, index].mean().item())
        best = ordered[0]
        second = ordered[1] if len(ordered) > 1 else best
        name = best.name if _is_significant_at(index, best, second) else None
        by_level.append((LEVELS[index].item(), name))
    return by_level


def _is_significant_at(index: int, best: Arm, second: Arm) -> bool:
    """Return Difference.is_significant for the errors at one level."""
    second_errors, best_errors, _ = paired_errors(second, best)
    gap = (second_errors - best_errors)[:, index]
    pairs = pairs_by_seed(second, best)
    if len(pairs) == 2:
        for second_mean, best_mean in pairs:
            if not second_mean[index] > best_mean[index]:
                return False
    return bool(gap.mean() > confidence_half_width(gap))
