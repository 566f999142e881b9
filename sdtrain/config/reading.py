"""The configurations of the commands that read a run: sdtrain-sample and sdtrain-evaluate.

What can be refused without torch is refused before it is imported.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdtrain.config.check import Checker, target_of
from sdtrain.config.overrides import typed_keys
from sdtrain.config.path_keys import with_homes_in
from sdtrain.config.schema import EvaluateConfig, SampleConfig
from sdtrain.console import warn
from sdtrain.errors import UserError
from sdtrain.runs.layout import SweepFolder
from sdtrain.runs.manifest import find_checkpoint

DRAWING = ("sampler", "grid", "guidance")
"""The nodes that say how a picture is drawn."""


def check_sample(config: dict, overrides: Iterable[str]) -> SampleConfig:
    """Checks a resolved configuration of `sdtrain-sample`. Raises UserError.

    What it returns has the folder of a whole checkpoint as `checkpoint`, and all prompts in
    `prompt`, those of prompt_file after those that were typed.
    """
    typed = typed_keys(overrides)
    config = with_homes_in(config)
    # Nothing is filled in here: the words that sdtrain fills in elsewhere are keys of the root.
    Checker(typed, filled_in=()).call(config, "", SampleConfig)
    checked = SampleConfig(**config)
    checked = replace(
        checked,
        checkpoint=str(find_checkpoint(Path(checked.checkpoint))),
        prompt=as_list(checked.prompt) + _prompts_in(checked.prompt_file),
        label=as_list(checked.label),
    )
    # Here torch is imported, with the targets.
    return replace(checked, **_checked_nodes(config, DRAWING, Checker(typed)))


def check_evaluate(config: dict, overrides: Iterable[str]) -> EvaluateConfig:
    """Checks a resolved configuration of `sdtrain-evaluate`. Raises UserError.

    What it returns has the folder of a sweep, or of a whole checkpoint, as `checkpoint`.
    """
    typed = typed_keys(overrides)
    config = with_homes_in(config)
    if "metric" in config:
        raise UserError(
            "There is no key 'metric': a yaml of configs/metric/ belongs under `metrics`",
            key="metric",
            remedy="Begin it with the line `# @package metrics.NAME`.",
        )
    # As in check_sample.
    Checker(typed, filled_in=()).call(config, "", EvaluateConfig)
    checked = EvaluateConfig(**config)
    folder = Path(checked.checkpoint)
    if not SweepFolder(folder).record.is_file():
        folder = find_checkpoint(folder)
    checked = replace(checked, checkpoint=str(folder))
    # Here torch is imported, with the targets.
    # A metric gets nothing from sdtrain: each of its arguments can be configured.
    metrics = _checked_nodes(config, ["metrics"], Checker(typed, filled_in=()))
    if "steps" in typed:
        _check_steps(metrics["metrics"])
    return replace(checked, **metrics, **_checked_nodes(config, DRAWING, Checker(typed)))


def _check_steps(metrics: dict) -> None:
    """UserError where no metric draws with the `steps` that were typed."""
    for name, node in metrics.items():
        if not getattr(target_of(node, f"metrics.{name}"), "own_steps", False):
            return
    raise UserError(
        f"steps has no effect: {', '.join(metrics)} draws with numbers of its own",
        key="steps",
        remedy=f"Set metrics.{next(iter(metrics))}.steps, or remove it.",
    )


def as_list(value: Any) -> list:
    """The values of a key that takes one, several or null."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _prompts_in(prompt_file: str | None) -> list[str]:
    """The lines of the file that are not empty."""
    if prompt_file is None:
        return []
    try:
        lines = Path(prompt_file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot be read as UTF-8 text: {error}",
            key="prompt_file",
            value=prompt_file,
            remedy="Give a file with one prompt a line.",
        ) from error
    return [line.strip() for line in lines if line.strip()]


def _checked_nodes(config: dict, names: Iterable[str], checker: Checker) -> dict[str, Any]:
    checked = {name: checker.node(config[name], name) for name in names}
    for note in checker.notes:
        warn(note)
    return checked
