"""The prompt accuracies that sdtrain-evaluate measured for the arms, and the settings it used."""

from pathlib import Path

from sdtrain.generation.drawing import format_record
from sdtrain.report.compare import Arm
from sdtrain.report.record import MeasuredRun


def prompt_accuracies(arms: list[Arm]) -> tuple[dict[str, str], list[str]]:
    """Return ({arm name: table cell}, notes on how they were measured).

    A cell holds the accuracies of prompts whose combination was trained, averaged over the seeds.
    Both are empty where no arm was measured.
    """
    cells = {}
    settings = {}
    for arm in arms:
        accuracies = []
        settings_of_runs = []
        for run in arm.runs_used:
            accuracy = trained_accuracy(run.evaluation)
            if accuracy:
                accuracies.append(accuracy)
                settings_of_runs.append(describe_settings(run))
        cells[arm.name] = _mean_cell(accuracies)
        if accuracies:
            settings[arm.name] = "; ".join(dict.fromkeys(settings_of_runs))
    if not settings:
        return {}, []
    if len(set(settings.values())) == 1:
        common = next(iter(settings.values()))
        return cells, [f"Prompt accuracy is of trained combinations: {common}."]
    by_arm = ". ".join(f"{name}: {text}" for name, text in settings.items())
    return cells, [f"Prompt accuracy was measured with different settings: {by_arm}."]


def _mean_cell(accuracies: list[dict[str, float]]) -> str:
    """Return the mean of each accuracy that all of the runs have, such as "colour 50.0 %"."""
    if not accuracies:
        return ""
    cells = []
    for name in accuracies[0]:
        values = [accuracy[name] for accuracy in accuracies if name in accuracy]
        if len(values) == len(accuracies):
            mean = sum(values) / len(values)
            cells.append(f"{name.replace('_', ' ')} {100 * mean:.1f} %")
    return ", ".join(cells)


def trained_accuracy(evaluation: dict) -> dict[str, float]:
    """Return {name: accuracy} for prompts whose combination was trained; empty if not measured."""
    accuracy = evaluation.get("prompt_accuracy")
    trained = accuracy.get("trained") if isinstance(accuracy, dict) else None
    if not isinstance(trained, dict):
        return {}
    return {name: value for name, value in trained.items() if isinstance(value, int | float)}


def describe_settings(run: MeasuredRun) -> str:
    """Return the settings of the measurement in words, with the checkpoint that was measured."""
    settings = run.evaluation.get("settings")
    settings = settings.get("prompt_accuracy") if isinstance(settings, dict) else None
    if not isinstance(settings, dict):
        return "unknown settings"
    words = []
    for key, value in settings.items():
        if key in ("sampler", "grid", "guidance"):
            words.append(f"{key} {format_record(value)}")
        elif key not in ("checkpoint", "config_sha256"):
            words.append(f"{key} {value}")
    images_seen = Path(str(settings.get("checkpoint"))).name.lstrip("0")
    is_last = images_seen == str(run.images_seen)
    words.append("last checkpoint" if is_last else f"checkpoint at {images_seen} images")
    return ", ".join(words)
