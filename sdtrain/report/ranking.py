"""Which arm is better, and which runs are left out of that."""

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
    "unpaired +-",
    "full sum",
    "stand-in",
    "bits saved",
]

UNTRAINED = "untrained"
"""What an arm with negative bits_saved is called, instead of its place and an interval."""


def ranked(comparison: Comparison) -> list[str]:
    """A line for each arm, best first: what sdtrain-report prints, and a sweep at its end."""
    lines = []
    for place, arm in enumerate(comparison.arms, 1):
        if arm.untrained:
            lines.append(f"{UNTRAINED}: {arm.name}, {_worse(arm)}")
            continue
        number = f"{arm.common:.4f} +- {arm.common_error:.4f}"
        lines.append(f"{place}. {arm.name}: {number}{_verdict(comparison, arm)}")
    return lines


def summary(comparison: Comparison) -> list[str]:
    """The lines that the command prints."""
    lines = ranked(comparison)
    for run, reason in comparison.refused:
        lines.append(f"not compared: {run.name}, {reason}")
    for run in comparison.unfinished:
        lines.append(f"not finished: {run.name}, {run.state} at {run.images_seen} images")
    return lines


def _worse(arm: Arm) -> str:
    """By how much an untrained arm is worse than what needs no training."""
    return f"{-arm.mean('bits_saved'):.4f} bits worse than the best linear denoiser"


def _verdict(comparison: Comparison, arm: Arm) -> str:
    if arm.difference is None:
        return "  baseline" if len(comparison.arms) > 1 else ""
    return f"  against {comparison.baseline.name}: {interval(arm.difference)}"


def interval(difference: Difference) -> str:
    """A difference in words, with its interval."""
    if difference.is_zero:
        return "exactly 0, a duplicate"
    half = f"{difference.half:.4f} (95 %, over {difference.over})"
    spread = ""
    if difference.spread:
        low, high = difference.spread
        spread = f", seeds from {low:+.4f} to {high:+.4f}"
    untold = "" if difference.told else "; no difference can be told"
    return f"{difference.mean:+.4f} +- {half}{spread}{untold}"


def ranking(comparison: Comparison) -> Section:
    """The arms, best first."""
    if not comparison.arms:
        nothing = "No run is at its end with a noise-level validation: there is nothing to rank."
        return Section("Ranking", [nothing])
    accuracies, notes = prompt_accuracies(comparison.arms)
    heads = [*HEADS, "prompt accuracy"] if accuracies else HEADS
    rows = []
    for arm in comparison.arms:
        row = _row(arm)
        rows.append([*row, accuracies[arm.name]] if accuracies else row)
    table = Table(heads, rows)
    explained = _explanation(comparison)
    return Section("Ranking", [explained, *_unlike(comparison), *notes, table])


def _row(arm: Arm) -> list[str]:
    found = arm.difference
    if arm.untrained:
        told = f"{UNTRAINED}: {_worse(arm)}"
    else:
        told = "baseline" if found is None else interval(found)
    return [
        arm.name,
        f"{arm.common:.4f}",
        "" if arm.untrained else f"{arm.common_error:.4f}",
        told,
        "" if found is None else f"{found.unpaired_half:.4f}",
        f"{arm.mean('bits_per_dim'):.4f}",
        f"{100 * arm.mean('stand_in_share'):.0f} %",
        f"{arm.mean('bits_saved'):.4f}",
    ]


def _explanation(comparison: Comparison) -> str:
    """What the numbers are."""
    inside = comparison.inside
    reached = LEVELS[inside].tolist()
    pictures = len(comparison.arms[0].errors)
    by_level = sum(arm.errors.mean(0) for arm in comparison.arms) * bits_over(inside)
    fine = (by_level[LEVELS > 0].sum() / by_level.sum()).item()
    scope = ""
    if len(comparison.arms) > 1 and comparison.over == "pictures":
        scope = (
            " Intervals are over pictures and speak of these trained networks; what other trainings"
            " would give is known from three seeds on, seed=0,1,2."
        )
    return (
        "Lower is better: bits per latent dimension over log_snr "
        f"{reached[0]:g} to {reached[-1]:g}, which every arm's schedule reaches, "
        f"{len(reached)} of {len(inside)}, on the same"
        f" {pictures} held-out pictures with the same noise. An arm that is worse than the best"
        " linear denoiser is called untrained, and has no place. The full sum runs from -12 to 12;"
        " outside a schedule's range the best linear denoiser stands in for the network, and its"
        f" share is beside it. {100 * fine:.0f} % of what is ranked lies above level 0, where fine"
        " detail is; what a picture shows is decided below: see the error by noise level and the"
        f" samples. Beside the interval stands how wide it were unpaired.{scope}"
    )


def _unlike(comparison: Comparison) -> list[str]:
    """What else differs between the arms, so that it is not taken for their own."""
    arms = comparison.arms
    notes = []
    raw = [arm.name for arm in arms if arm.used[0].last.weights == "raw"]
    if 0 < len(raw) < len(arms):
        notes.append(f"Not all numbers are of averaged weights: {', '.join(raw)} kept none.")
    budgets = {arm.name: max(run.images_seen for run in arm.used) for arm in arms}
    if len(set(budgets.values())) > 1:
        seen = ", ".join(f"{name} {images}" for name, images in budgets.items())
        notes.append(f"The arms have not seen as many images: {seen}.")
    for arm in arms:
        first = arm.used[0].trained_by
        if first:
            notes.append(f"{arm.name} has the weights of {first}: see what each draws.")
    return notes + _unlike_seeds(arms)


def _unlike_seeds(arms: list[Arm]) -> list[str]:
    seeds = [{run.seed for run in arm.used} for arm in arms]
    if any(each != seeds[0] for each in seeds):
        return [
            "The arms have no seed in common: a difference is also one of initial weights, order "
            "and noise."
        ]
    if all(len(arm.used) == len(arm.runs) for arm in arms):
        return []
    short = [arm.name for arm in arms if len(arm.used) == len(arm.runs)]
    why = ""
    if short:
        why = f", as {', '.join(short)} {'has' if len(short) == 1 else 'have'} no other"
    taken = ", ".join(sorted(seeds[0]))
    return [f"Taken are the seeds that all arms have, {taken}; others are left out{why}."]


def left_out(comparison: Comparison) -> Section:
    """Runs that have no place in the ranking, and why; no parts where there are none."""
    rows = []
    for run in comparison.unfinished:
        rows.append([run.name, f"not finished: {run.state}{_exit_code(run)}", str(run.images_seen)])
    for run, reason in comparison.refused:
        rows.append([run.name, f"not compared: {reason}", str(run.images_seen)])
    table = Table(["run", "why", "images seen"], rows)
    return Section("Left out of the ranking", [table] if rows else [])


def _exit_code(run: MeasuredRun) -> str:
    return f", exit code {run.exit_code}" if run.exit_code else ""
