"""What sdtrain-report says of a comparison, and how it is laid out."""

import copy
import os
from pathlib import Path

from rich.console import Console

from sdtrain.assemble.load import check_targets
from sdtrain.assemble.model import build_objective, build_schedule
from sdtrain.audit.audit import GROUPS, Entry, effective_weight
from sdtrain.audit.audit import compare as compare_weights
from sdtrain.errors import UserError
from sdtrain.evaluation.look import writable
from sdtrain.evaluation.noise_level_error import LEVELS, bits_over
from sdtrain.pictures import write_png
from sdtrain.report import figures
from sdtrain.report.compare import (
    Arm,
    Comparison,
    Difference,
    compare,
    parting,
    seed,
    winners,
    without_seed,
)
from sdtrain.report.page import Section, Table, markdown, page
from sdtrain.runs.checkpoint import write_text
from sdtrain.runs.lock import left_behind
from sdtrain.runs.reader import RunRecord, differences, find_runs


def report(folders: list[Path], baseline: str | None, output: Path) -> None:
    runs, console = find_runs(folders), Console(markup=False, highlight=False)
    for run in runs:
        if run.state == "running" and left_behind(run.folder):
            run.state = "killed"
    if baseline is not None and baseline not in {
        name for run in runs for name in (run.name, without_seed(run.name))
    }:
        raise UserError(
            f"--baseline {baseline} is none of the runs: {', '.join(run.name for run in runs)}."
        )
    comparison = compare(runs, baseline)
    writable(output, "--output")
    sections = [ranking(comparison), left_out(comparison)]
    if comparison.arms:
        sections += [by_level(comparison), curves(comparison)]
    sections.append(objectives(*audited(comparison)))
    if comparison.arms:
        sections.append(drawn(comparison))
    sections += [configuration(runs), cost(runs)]
    if len(runs) == 2:
        sections.append(where_they_part(*runs))
    sections = [section for section in sections if section.parts]
    for section in sections:
        for part in section.parts:
            if isinstance(part, tuple):
                write_png(part[1], output / f"{part[0]}.png")
    title = f"{len(runs)} run{'s' if len(runs) > 1 else ''} of sdtrain"
    write_text(output / "report.md", markdown(title, sections))
    write_text(output / "report.html", page(title, sections))
    for line in summary(comparison):
        console.print(line, soft_wrap=True)
    console.print(f"Written to {output}: report.html, report.md", soft_wrap=True)


def summary(comparison: Comparison) -> list[str]:
    lines = [
        f"{place}. {arm.name}: {arm.common:.4f} +- {arm.common_error:.4f}{verdict(comparison, arm)}"
        for place, arm in enumerate(comparison.arms, 1)
    ]
    lines += [f"not compared: {run.name}, {reason}" for run, reason in comparison.refused]
    return lines + [
        f"not finished: {run.name}, {run.state} at {run.images_seen} images"
        for run in comparison.unfinished
    ]


def verdict(comparison: Comparison, arm: Arm) -> str:
    if arm.difference is None:
        return "  baseline" if len(comparison.arms) > 1 else ""
    return f"  against {comparison.baseline.name}: {interval(arm.difference)}"


def interval(difference: Difference) -> str:
    if difference.mean == 0 and not difference.half:
        return "exactly 0, a duplicate"
    half = f" +- {difference.half:.4f} (95 %, over {difference.over})"
    spread = (
        f", seeds from {difference.spread[0]:+.4f} to {difference.spread[1]:+.4f}"
        if difference.spread
        else ""
    )
    return f"{difference.mean:+.4f}{half}{spread}{'' if difference.told else '; no difference can be told'}"


def ranking(comparison: Comparison) -> Section:
    if not comparison.arms:
        return Section(
            "Ranking",
            ["No run is at its end with a noise-level validation: there is nothing to rank."],
        )
    reached = LEVELS[comparison.inside].tolist()
    heads = [
        "arm",
        "bits/dim",
        "standard error",
        "difference to baseline",
        "unpaired +-",
        "full sum",
        "stand-in",
        "bits saved",
    ]
    accuracy, notes = prompt_accuracies(comparison)
    rows = []
    for arm in comparison.arms:
        told = "baseline" if arm.difference is None else interval(arm.difference)
        unpaired = "" if arm.difference is None else f"{arm.difference.unpaired_half:.4f}"
        rows.append(
            [
                arm.name,
                f"{arm.common:.4f}",
                f"{arm.common_error:.4f}",
                told,
                unpaired,
                f"{arm.mean('bits_per_dim'):.4f}",
                f"{100 * arm.mean('stand_in_share'):.0f} %",
                f"{arm.mean('bits_saved'):.4f}",
                *([accuracy[arm.name]] if accuracy else []),
            ]
        )
    if accuracy:
        heads.append("prompt accuracy")
    scope = (
        ""
        if len(comparison.arms) < 2 or comparison.over == "seeds"
        else (
            " Intervals are over pictures and speak of these trained networks; what other trainings would give is known from three seeds on, seed=0,1,2."
        )
    )
    by_level = sum(arm.errors.mean(0) for arm in comparison.arms) * bits_over(comparison.inside)
    fine = (by_level[LEVELS > 0].sum() / by_level.sum()).item()
    return Section(
        "Ranking",
        [
            f"Lower is better: bits per latent dimension over log_snr {reached[0]:g} to {reached[-1]:g}, which every arm's schedule reaches, {len(reached)} of "
            f"{len(comparison.inside)}, on the same {len(comparison.arms[0].errors)} held-out pictures with the same noise. The full sum runs from -12 to 12; "
            f"outside a schedule's range the best linear denoiser stands in for the network, and its share is beside it. {100 * fine:.0f} % of what is ranked "
            f"lies above level 0, where fine detail is; what a picture shows is decided below: see the error by noise level and the samples. Beside the "
            f"interval stands how wide it were unpaired.{scope}",
            *unlike(comparison),
            *notes,
            Table(heads, rows),
        ],
    )


def unlike(comparison: Comparison) -> list[str]:
    """What else differs between the arms, so that it is not taken for their own."""
    notes, budgets = (
        [],
        {arm.name: max(run.images_seen for run in arm.used) for arm in comparison.arms},
    )
    weights = {arm.name: arm.used[0].last.weights for arm in comparison.arms}
    if len(set(weights.values())) > 1:
        notes.append(
            f"Not all numbers are of averaged weights: {', '.join(name for name, what in weights.items() if what == 'raw')} kept none."
        )
    if len(set(budgets.values())) > 1:
        notes.append(
            f"The arms have not seen as many images: {', '.join(f'{name} {seen}' for name, seen in budgets.items())}."
        )
    seeds = [{str(seed(run)) for run in arm.used} for arm in comparison.arms]
    if any(each != seeds[0] for each in seeds):
        notes.append(
            "The arms have no seed in common: a difference is also one of initial weights, order and noise."
        )
    elif any(len(arm.used) < len(arm.runs) for arm in comparison.arms):
        short = [arm.name for arm in comparison.arms if len(arm.used) == len(arm.runs)]
        why = (
            f", as {', '.join(short)} {'has' if len(short) == 1 else 'have'} no other"
            if short
            else ""
        )
        notes.append(
            f"Taken are the seeds that all arms have, {', '.join(sorted(seeds[0]))}; others are left out{why}."
        )
    return notes


def prompt_accuracies(comparison: Comparison) -> tuple[dict[str, str], list[str]]:
    """({arm: its mean over seeds, of prompts of trained combinations}, how it was measured); nothing where nothing was."""
    cells, conditions = {}, {}
    for arm in comparison.arms:
        found = [
            (run, accuracy) for run in arm.used if (accuracy := trained_accuracy(run.evaluation))
        ]
        names = [
            name
            for name in (found[0][1] if found else ())
            if all(name in accuracy for _, accuracy in found)
        ]
        means = {name: sum(accuracy[name] for _, accuracy in found) / len(found) for name in names}
        cells[arm.name] = ", ".join(
            f"{name.replace('_', ' ')} {100 * value:.1f} %" for name, value in means.items()
        )
        if found:
            conditions[arm.name] = "; ".join(dict.fromkeys(measured_how(run) for run, _ in found))
    if not conditions:
        return {}, []
    how = next(iter(conditions.values()))
    if all(each == how for each in conditions.values()):
        return cells, [f"Prompt accuracy is of trained combinations: {how}."]
    return cells, [
        f"Prompt accuracy was not measured alike: {'. '.join(f'{name}: {each}' for name, each in conditions.items())}."
    ]


def measured_how(run: RunRecord) -> str:
    settings = run.evaluation.get("settings")
    settings = settings.get("prompt_accuracy") if isinstance(settings, dict) else None
    if not isinstance(settings, dict):
        return "it is not known how"
    at = Path(str(settings.get("checkpoint"))).name.lstrip("0")
    said = ", ".join(
        f"{key} {value}" for key, value in settings.items() if key not in ("checkpoint", "sampler")
    )
    return f"{said}, {str(settings.get('sampler')).rpartition('.')[2]}, {'last checkpoint' if at == str(run.images_seen) else f'checkpoint at {at} images'}"


def trained_accuracy(evaluation: dict) -> dict[str, float]:
    """Of prompts whose combination was trained, where it was measured."""
    found = evaluation.get("prompt_accuracy")
    found = found.get("trained") if isinstance(found, dict) else None
    return (
        {name: value for name, value in found.items() if isinstance(value, int | float)}
        if isinstance(found, dict)
        else {}
    )


def left_out(comparison: Comparison) -> Section:
    code = lambda run: f", exit code {run.exit_code}" if run.exit_code else ""  # noqa: E731
    odd = [
        [run.name, f"not finished: {run.state}{code(run)}", str(run.images_seen)]
        for run in comparison.unfinished
    ]
    odd += [
        [run.name, f"not compared: {reason}", str(run.images_seen)]
        for run, reason in comparison.refused
    ]
    return Section(
        "Left out of the ranking", [Table(["run", "why", "images seen"], odd)] if odd else []
    )


def audited(comparison: Comparison) -> tuple[list[Entry], list[str]]:
    """(what each trains, ranked or not, of its configuration, which may name only what is ours; a line for each that cannot be told)."""
    entries, untold = [], []
    others = [*comparison.unfinished, *(run for run, _ in comparison.refused)]
    known = {arm.name: arm.runs[0].config for arm in comparison.arms} | {
        run.name: run.config for run in others if run.config
    }
    for name, config in known.items():
        cfg = {group: copy.deepcopy(config.get(group)) or {} for group in GROUPS}
        try:
            if missing := [
                group
                for group in ("schedule", "prediction", "weighting", "times", "noise")
                if "_target_" not in cfg[group]
            ]:
                raise UserError(f"its configuration has no {missing[0]}")
            check_targets(cfg, [])
            entry = Entry(name, cfg, build_schedule(cfg))
            entry.log_snr, entry.weight = effective_weight(build_objective(cfg)) or (None, None)
        except UserError as error:
            untold.append(f"{name}: its effective weight is not shown: {error}")
        else:
            entries.append(entry)
    compare_weights(entries)
    return entries, untold


def by_level(comparison: Comparison) -> Section:
    rows: list[list[str]] = []
    for level, name in winners(comparison) if len(comparison.arms) > 1 else []:
        said = name or f"none that can be told from the next over {comparison.over}"
        if rows and rows[-1][0] == said:
            rows[-1][2] = f"{level:g}"
        else:
            rows.append([said, f"{level:g}", f"{level:g}"])
    table = [Table(["lowest error", "from log_snr", "to"], rows)] if rows else []
    return Section("Error by noise level", [("noise_levels", figures.levels(comparison)), *table])


def curves(comparison: Comparison) -> Section:
    return Section("While training", [("learning_curves", figures.learning(comparison))])


def objectives(entries: list[Entry], untold: list[str]) -> Section:
    groups = dict.fromkeys(
        tuple(each.name for each in entries if each is one or one.name in each.duplicate_of)
        for one in entries
        if one.duplicate_of
    )
    notes = [
        f"Duplicates by their objective (schedule, prediction, weighting, loss, times, noise) alone: {'; '.join(group)}."
        for group in groups
    ]
    notes += untold
    notes += [
        f"{each.name}: same objective, other parameterisation: {', '.join(each.same_objective_as)}."
        for each in entries
        if each.same_objective_as
    ]
    weights = [
        (each.name, each.log_snr, each.weight) for each in entries if each.weight is not None
    ]
    return Section(
        "What was trained",
        [*([("effective_weights", figures.weights(weights))] if weights else []), *notes],
    )


def drawn(comparison: Comparison) -> Section:
    sheet, without = figures.samples(comparison.arms)
    notes = (
        [
            f"Not shown, as their last pictures are missing or have other prompts: {'; '.join(without)}."
        ]
        if without
        else []
    )
    return Section(
        "Samples, with the same prompts and seeds", [("samples", sheet), *notes] if sheet else []
    )


def configuration(runs: list[RunRecord]) -> Section:
    runs = [run for run in runs if run.config]  # of one that has not begun nothing is known
    differ = {
        key: values for key, values in differences(runs).items() if not key.endswith("sha256")
    }
    rows = [
        [key, *shown(["null" if value is None else str(value) for value in values])]
        for key, values in differ.items()
    ]
    return Section(
        "What differs in configuration",
        [Table(["key", *(run.name for run in runs)], rows)] if rows and len(runs) > 1 else [],
    )


def shown(values: list[str], width: int = 80) -> list[str]:
    """At most `width` characters of each: from a little before the place where they begin to differ."""
    start = max(0, len(os.path.commonprefix(values)) - 20) if max(map(len, values)) > width else 0
    return [
        f"{'... ' if start else ''}{value[start : start + width]}{' ...' if len(value) > start + width else ''}"
        for value in values
    ]


def cost(runs: list[RunRecord]) -> Section:
    rows = []
    for run in runs:
        minutes = run.lines[-1]["seconds"] / 60 if run.lines else 0
        memory = f"{run.peak_memory_mb:.0f}" if run.peak_memory_mb else ""
        rows.append(
            [
                run.name,
                str(run.images_seen),
                f"{minutes:.1f}",
                f"{run.speed:.0f}" if run.speed else "",
                memory,
            ]
        )
    return Section(
        "Speed and memory",
        [Table(["run", "images seen", "minutes", "images/s", "peak memory, MB"], rows)],
    )


def where_they_part(one: RunRecord, other: RunRecord) -> Section:
    lines, seen = parting(one, other)
    both = f"{lines} line{'s' if lines > 1 else ''} that both have"
    said = (
        f"The training losses never part, in {both}."
        if seen is None
        else f"The training losses part at {seen} images seen."
    )
    said = (
        said
        if lines
        else "The two runs have no line of the training loss over the same images (trainer.log_every)."
    )
    return Section("Two runs", [said])
