"""What sdtrain-evaluate has measured of the arms' prompts, and how."""

from pathlib import Path

from sdtrain.generation.drawing import in_words
from sdtrain.report.compare import Arm
from sdtrain.report.record import MeasuredRun


def prompt_accuracies(arms: list[Arm]) -> tuple[dict[str, str], list[str]]:
    """({arm: its mean over seeds, of prompts of trained combinations}, how it was measured).

    Both are empty where nothing was measured.
    """
    cells = {}
    conditions = {}
    for arm in arms:
        found = {}
        for run in arm.used:
            accuracy = trained_accuracy(run.evaluation)
            if accuracy:
                found[run.name] = accuracy
        cells[arm.name] = _mean_of(list(found.values()))
        if found:
            how = [measured_how(run) for run in arm.used if run.name in found]
            conditions[arm.name] = "; ".join(dict.fromkeys(how))
    if not conditions:
        return {}, []
    if len(set(conditions.values())) == 1:
        how = next(iter(conditions.values()))
        return cells, [f"Prompt accuracy is of trained combinations: {how}."]
    each = ". ".join(f"{name}: {how}" for name, how in conditions.items())
    return cells, [f"Prompt accuracy was not measured alike: {each}."]


def _mean_of(accuracies: list[dict[str, float]]) -> str:
    """Of each name that all of them have, their mean."""
    shown = []
    for name in accuracies[0] if accuracies else ():
        values = [accuracy[name] for accuracy in accuracies if name in accuracy]
        if len(values) == len(accuracies):
            mean = sum(values) / len(values)
            shown.append(f"{name.replace('_', ' ')} {100 * mean:.1f} %")
    return ", ".join(shown)


def trained_accuracy(evaluation: dict) -> dict[str, float]:
    """{name: accuracy} of prompts whose combination was trained, where it was measured."""
    found = evaluation.get("prompt_accuracy")
    found = found.get("trained") if isinstance(found, dict) else None
    if not isinstance(found, dict):
        return {}
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


def measured_how(run: MeasuredRun) -> str:
    """The settings of the measurement in words, and of which checkpoint it is."""
    settings = run.evaluation.get("settings")
    settings = settings.get("prompt_accuracy") if isinstance(settings, dict) else None
    if not isinstance(settings, dict):
        return "it is not known how"
    words = []
    for key, value in settings.items():
        if key in ("sampler", "grid", "guidance"):
            words.append(f"{key} {in_words(value)}")
        elif key not in ("checkpoint", "config_sha256"):
            words.append(f"{key} {value}")
    at = Path(str(settings.get("checkpoint"))).name.lstrip("0")
    is_last = at == str(run.images_seen)
    words.append("last checkpoint" if is_last else f"checkpoint at {at} images")
    return ", ".join(words)
