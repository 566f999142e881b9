"""The ranking of the arms, and the runs that are left out of it."""

import torch

from sdtrain.evaluation.noise_level_error import LEVELS, bits_over
from sdtrain.report.compare import Arm, Comparison
from sdtrain.report.prompt_accuracy import prompt_accuracies
from sdtrain.report.record import MeasuredRun
from sdtrain.report.section import Section, Table
from sdtrain.report.statistics import Difference

HEADS = [
    "arm",
    "bits/dim",
    "standard error",
    "difference to baseline",
    "+- if unpaired",
    "bits/dim, all levels",
    "linear share",
    "bits saved",
]

UNTRAINED = "untrained"
"""Printed instead of a rank and an interval for an arm whose bits_saved are negative."""


def ranking_lines(comparison: Comparison) -> list[str]:
    """Return a line for each arm, best first, as sdtrain-report prints them and a sweep at its end.

    An untrained arm has no rank.
    """
    lines = []
    for rank, arm in enumerate(comparison.arms, 1):
        if arm.is_untrained:
            lines.append(f"{UNTRAINED}: {arm.name}, {_worse_than_linear(arm)}")
        else:
            bits = f"{arm.common_bits:.4f} +- {arm.common_bits_error:.4f}"
            lines.append(f"{rank}. {arm.name}: {bits}{_compared_with_baseline(comparison, arm)}")
    return lines


def summary_lines(comparison: Comparison) -> list[str]:
    """Return the lines that sdtrain-report prints: the ranking, then the runs left out of it."""
    lines = ranking_lines(comparison)
    for run, reason in comparison.not_comparable:
        lines.append(f"not compared: {run.name}, {reason}")
    for run in comparison.unfinished:
        lines.append(f"not finished: {run.name}, {run.state} at {run.images_seen} images")
    return lines


def _worse_than_linear(arm: Arm) -> str:
    """Say by how much an untrained arm is worse than the best linear denoiser."""
    return f"{-arm.mean_summary('bits_saved'):.4f} bits worse than the best linear denoiser"


def _compared_with_baseline(comparison: Comparison, arm: Arm) -> str:
    if arm.difference is not None:
        return f"  against {comparison.baseline.name}: {describe_difference(arm.difference)}"
    return "  baseline" if len(comparison.arms) > 1 else ""


def describe_difference(difference: Difference) -> str:
    """Return a difference with its interval in words."""
    if difference.is_zero:
        return "exactly 0, a duplicate"
    text = (
        f"{difference.mean:+.4f} +- {difference.half_width:.4f} (95 %, over {difference.samples})"
    )
    if difference.seed_range:
        low, high = difference.seed_range
        text += f", seeds from {low:+.4f} to {high:+.4f}"
    if not difference.is_significant:
        text += "; not significant"
    return text


def ranking_section(comparison: Comparison) -> Section:
    """Return a section with the ranking table, what its columns mean, and caveats."""
    if not comparison.arms:
        nothing = "No finished run has a noise-level validation, so there is nothing to rank."
        return Section("Ranking", [nothing])
    accuracies, accuracy_notes = prompt_accuracies(comparison.arms)
    heads = [*HEADS, "prompt accuracy"] if accuracies else HEADS
    rows = []
    for arm in comparison.arms:
        row = _row(arm)
        rows.append([*row, accuracies[arm.name]] if accuracies else row)
    paragraphs = [*_explanation(comparison), *_caveats(comparison.arms), *accuracy_notes]
    return Section("Ranking", [*paragraphs, Table(heads, rows)])


def _row(arm: Arm) -> list[str]:
    if arm.is_untrained:
        difference = f"{UNTRAINED}: {_worse_than_linear(arm)}"
    elif arm.difference is None:
        difference = "baseline"
    else:
        difference = describe_difference(arm.difference)
    unpaired = "" if arm.difference is None else f"{arm.difference.unpaired_half_width:.4f}"
    return [
        arm.name,
        f"{arm.common_bits:.4f}",
        "" if arm.is_untrained else f"{arm.common_bits_error:.4f}",
        difference,
        unpaired,
        f"{arm.mean_summary('bits_per_dim'):.4f}",
        f"{100 * arm.mean_summary('stand_in_share'):.0f} %",
        f"{arm.mean_summary('bits_saved'):.4f}",
    ]


def _explanation(comparison: Comparison) -> list[str]:
    """Return paragraphs that say what the numbers of the table mean."""
    common_levels = comparison.common_levels
    reached = LEVELS[common_levels].tolist()
    pictures = len(comparison.arms[0].errors)
    ranked = (
        "Lower is better. Arms are ranked by their bits per latent dimension over log_snr "
        f"{reached[0]:g} to {reached[-1]:g}, the {len(reached)} of {len(common_levels)} noise "
        f"levels that every arm's schedule reaches, on the same {pictures} held-out pictures with "
        "the same noise. An arm that is worse than the best linear denoiser is called untrained "
        "and has no rank."
    )
    columns = (
        "Differences are paired, picture by picture or, from three common seeds on, seed by seed. "
        '"All levels" are log_snr -12 to 12: outside the range of its schedule the best linear '
        'denoiser replaces the network, and "linear share" is the part of the sum that is the '
        'linear denoiser\'s. "Bits saved" is the gain over the linear denoiser on all levels. '
        '"+- if unpaired" is how wide the interval would be if the arms had been measured on '
        "different pictures with different noise."
    )
    detail = (
        f"{100 * _share_above_zero(comparison):.0f} % of the ranked bits lie above log_snr 0, where"
        " fine detail is predicted. What a picture shows is decided below 0: compare the error by"
        " noise level and the samples."
    )
    paragraphs = [ranked, columns, detail]
    if len(comparison.arms) > 1 and comparison.samples == "pictures":
        paragraphs.append(
            "Intervals are over pictures and hold for these trained networks only. To learn what "
            "other trainings would give, train each arm with three or more seeds, seed=0,1,2."
        )
    return paragraphs


def _share_above_zero(comparison: Comparison) -> float:
    """Return the share of the ranked bits that comes from levels with log_snr > 0."""
    errors_of_arms = torch.zeros(len(LEVELS), dtype=torch.float64)
    for arm in comparison.arms:
        errors_of_arms += arm.errors.mean(0)
    by_level = errors_of_arms * bits_over(comparison.common_levels)
    return (by_level[LEVELS > 0].sum() / by_level.sum()).item()


def _caveats(arms: list[Arm]) -> list[str]:
    """Say what else differs between the arms, so that it is not taken for a merit of one."""
    notes = []
    raw = [arm.name for arm in arms if arm.runs_used[0].last_validation.weights == "raw"]
    if 0 < len(raw) < len(arms):
        notes.append(f"Measured with raw instead of averaged weights: {', '.join(raw)}.")
    budgets = [_images_seen(arm) for arm in arms]
    if len(set(budgets)) > 1:
        counts = [f"{arm.name} {_images_seen(arm)}" for arm in arms]
        notes.append(f"The arms have seen different numbers of images: {', '.join(counts)}.")
    for arm in arms:
        trained_by = arm.runs_used[0].trained_by
        if trained_by:
            notes.append(
                f"{arm.name} has the weights of {trained_by}: they differ in their samples only."
            )
    return notes + _seed_caveats(arms)


def _images_seen(arm: Arm) -> int:
    return max(run.images_seen for run in arm.runs_used)


def _seed_caveats(arms: list[Arm]) -> list[str]:
    seeds = _seeds_used(arms[0])
    for arm in arms[1:]:
        if _seeds_used(arm) != seeds:
            return [
                "The arms have no seed in common, so their differences also come from other initial"
                " weights, another order of the pictures and other noise."
            ]
    complete = [arm.name for arm in arms if len(arm.runs_used) == len(arm.runs)]
    if len(complete) == len(arms):
        return []
    reason = ""
    if complete:
        have = "has" if len(complete) == 1 else "have"
        reason = f", because {', '.join(complete)} {have} no other"
    common = ", ".join(sorted(seeds))
    return [f"Only runs with the seeds that all arms have ({common}) are compared{reason}."]


def _seeds_used(arm: Arm) -> set[str]:
    return {run.seed for run in arm.runs_used}


def left_out_section(comparison: Comparison) -> Section:
    """Return a section of the runs that are not ranked, and why; it has no parts without any."""
    rows = []
    for run in comparison.unfinished:
        rows.append([run.name, f"not finished: {run.state}{_exit_code(run)}", str(run.images_seen)])
    for run, reason in comparison.not_comparable:
        rows.append([run.name, f"not compared: {reason}", str(run.images_seen)])
    table = Table(["run", "reason", "images seen"], rows)
    return Section("Left out of the ranking", [table] if rows else [])


def _exit_code(run: MeasuredRun) -> str:
    return f", exit code {run.exit_code}" if run.exit_code else ""
