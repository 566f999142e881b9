"""Evaluate a run, or each arm of a sweep: print a table per metric, write evaluation.json."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sdtrain import pictures
from sdtrain.config.build import build
from sdtrain.config.schema import EvaluateConfig
from sdtrain.console import warn
from sdtrain.errors import UserError
from sdtrain.evaluation.metric import CAPTIONS, REFERENCES, Measurement, Metric
from sdtrain.evaluation.subject import Subject
from sdtrain.files import check_writable, sha256_of, write_text
from sdtrain.models.hub import find_checkpoint_pipeline
from sdtrain.models.pipeline_folder import UNET, is_pipeline
from sdtrain.runs.layout import CheckpointFolder, EvaluationFolder, SweepFolder
from sdtrain.runs.manifest import find_checkpoint, list_checkpoints
from sdtrain.runs.reader import read_evaluation, sweep_arms
from sdtrain.weight_files import DIFFUSERS, find_weight_files

LoadSubject = Callable[[Path], Subject]
"""The folder of a checkpoint, or a pipeline -> what the metrics measure."""

IDENTITY_KEYS = ("checkpoint", "config_sha256", "data")
"""Settings in which results agree that are kept together in evaluation.json."""

RESERVED_KEYS = (
    "data",
    "settings",
    "checkpoint",
    "config_sha256",
    "num_images",
    "seed",
    "steps",
    "guidance_scale",
    "sampler",
    "grid",
    "guidance",
    "ema",
)
"""Keys of evaluation.json that are not metrics."""


@dataclass(frozen=True)
class Evaluated:
    """What is evaluated. path: a checkpoint or a pipeline. sha256: of the run's configuration, or
    of the pipeline's UNet. output: where the results are written.
    """

    path: Path
    sha256: str
    output: EvaluationFolder


def evaluate(config: EvaluateConfig, load_subject: LoadSubject) -> None:
    """Evaluate config.checkpoint: a complete checkpoint, a pipeline, or the arms of a sweep that
    have a checkpoint.

    If an arm cannot be evaluated, the others still are, and the first UserError is raised at the
    end.
    """
    console = Console(markup=False, highlight=False)
    metrics = build_metrics(config.metrics)
    folder = Path(config.checkpoint)
    if not SweepFolder(folder).record.is_file():
        evaluated = _evaluated(folder, config.output)
        evaluate_one(config, metrics, evaluated, load_subject, console)
        return
    failure = None
    for arm in _arms(folder):
        console.print(arm.name, soft_wrap=True)
        if not list_checkpoints(arm):
            console.print("no checkpoint: not evaluated")
            continue
        own_output = f"{config.output}/{arm.name}" if config.output else config.output
        try:
            evaluated = _evaluated(find_checkpoint(arm), own_output)
            evaluate_one(config, metrics, evaluated, load_subject, console)
        except UserError as error:  # the other arms may succeed
            console.print(f"not evaluated: {error}", soft_wrap=True)
            if failure is None:
                failure = error.with_prefix(f"{arm.name} could not be evaluated")
    if failure:
        raise failure


def _arms(sweep: Path) -> list[Path]:
    """Return the run folders of a sweep. Raises UserError if its record cannot be read."""
    arms = sweep_arms(sweep)
    if arms is None:
        raise UserError(
            f"is a sweep whose {SweepFolder(sweep).record.name} cannot be read",
            key="checkpoint",
            value=str(sweep),
            remedy="Give the folder of one of its arms in checkpoint.",
        )
    return arms


def build_metrics(nodes: dict) -> dict[str, Metric]:
    """Build the metrics, by name in the order of `nodes`. Raises UserError."""
    metrics = {}
    for name, node in nodes.items():
        key = f"metrics.{name}"
        metric = build(node, key)
        if not isinstance(metric, Metric):
            raise UserError(
                f"{key} is not a metric",
                key=key,
                remedy="Name a subclass of sdtrain.evaluation.metric.Metric in its _target_.",
            )
        if name in RESERVED_KEYS:
            raise UserError(
                f"{key}: a metric cannot have this name, which evaluation.json uses already",
                key=key,
                remedy="Give it another name, in the first line of its yaml.",
            )
        metrics[name] = metric
    return metrics


def _evaluated(path: Path, output: str | None) -> Evaluated:
    """Return what is evaluated: a complete checkpoint, whose results are written into its run
    unless `output` is given, or a pipeline. Raises UserError for a pipeline without `output`.
    """
    if not is_pipeline(path):
        checkpoint = CheckpointFolder(path)
        folder = EvaluationFolder(Path(output)) if output else checkpoint.run.evaluation
        return Evaluated(path, sha256_of(checkpoint.config), folder)
    if output is None:
        raise UserError(
            f"output is missing: checkpoint={path} is a pipeline, into which nothing is written",
            key="output",
            remedy="Set output to a folder.",
        )
    unet = find_weight_files(find_checkpoint_pipeline(path) / UNET, DIFFUSERS)
    return Evaluated(path, unet.sha256 if unet else "", EvaluationFolder(Path(output)))


def evaluate_one(
    config: EvaluateConfig,
    metrics: dict[str, Metric],
    evaluated: Evaluated,
    load_subject: LoadSubject,
    console: Console,
) -> None:
    """Print a table of each metric, and write its pictures and evaluation.json.

    Results of earlier evaluations of the same checkpoint are kept.
    """
    subject = load_subject(evaluated.path)
    for name, metric in metrics.items():
        check_needs(name, metric, subject)
        metric.check(subject)
    folder = evaluated.output
    check_writable(folder.path)
    settings = _settings(config, evaluated, subject)
    result = settings | {"settings": {}}
    for name, (earlier_settings, columns) in _earlier_results(folder, settings).items():
        result[name] = columns
        result["settings"][name] = earlier_settings
    for name, metric in metrics.items():
        measurement = metric.measure(subject)
        for part, picture in measurement.pictures.items():
            pictures.write_png(picture, folder.picture(name, part))
        console.print(table_of(name, metric, measurement))
        result[name] = measurement.columns
        result["settings"][name] = dict(settings)
        if metric.own_steps:
            del result["settings"][name]["steps"]
    if config.data and not subject.data_source.was_used and not is_pipeline(evaluated.path):
        warn("data has no effect: none of these metrics uses the training pictures.")
    write_text(folder.numbers, json.dumps(result, indent=1) + "\n")
    console.print(f"Written to {folder.path}", soft_wrap=True)


def _settings(config: EvaluateConfig, evaluated: Evaluated, subject: Subject) -> dict[str, Any]:
    """Return what evaluation.json records about how its numbers were measured."""
    of_pipeline = {"data": config.data} if is_pipeline(evaluated.path) else {}
    return of_pipeline | {
        "checkpoint": str(evaluated.path),
        "config_sha256": evaluated.sha256,
        "num_images": config.num_images,
        "seed": config.seed,
        **subject.drawing.settings,
        "ema": config.ema,
    }


def check_needs(name: str, metric: Metric, subject: Subject) -> None:
    """Raise UserError if the run lacks what the metric needs."""
    unknown = metric.needs - {CAPTIONS, REFERENCES}
    if unknown:
        raise UserError(
            f"metrics.{name} has {', '.join(sorted(unknown))} in `needs`",
            key=f"metrics.{name}",
            allowed=f"{CAPTIONS}, {REFERENCES}",
        )
    if CAPTIONS in metric.needs and "caption" not in subject.reads:
        raise UserError(
            "draws pictures of captions, which this model does not read: it was trained with "
            "another model/conditioner",
            key="metrics",
            value=name,
        )
    missing = subject.reads - metric.gives
    if missing:
        raise UserError(
            f"draws pictures without a {' or a '.join(sorted(missing))}, which this model reads",
            key="metrics",
            value=name,
            remedy="Give another checkpoint or another metric.",
        )
    if REFERENCES in metric.needs:
        subject.data.split("train")  # raises UserError if the data set no longer exists


def _earlier_results(
    folder: EvaluationFolder, settings_now: dict[str, Any]
) -> dict[str, tuple[dict[str, Any], Any]]:
    """Return {metric: (settings, columns)} of earlier evaluations of the same checkpoint, or of the
    same pipeline on the same data.
    """
    evaluation = read_evaluation(folder.path)
    settings_of = evaluation.get("settings")
    if not isinstance(settings_of, dict):
        return {}
    results = {}
    for name, settings in settings_of.items():
        if not isinstance(settings, dict) or name not in evaluation:
            continue
        if all(settings.get(key) == settings_now.get(key) for key in IDENTITY_KEYS):
            results[name] = (settings, evaluation[name])
    return results


def table_of(name: str, metric: Metric, measurement: Measurement) -> Table:
    """Return the table of a metric, with unit and direction below it."""
    table = Table("", *measurement.columns, title=name, caption=_caption(metric))
    first = next(iter(measurement.columns.values()))
    for row in first:
        values = [metric.format(column[row]) for column in measurement.columns.values()]
        table.add_row(row.replace("_", " "), *values)
    return table


def _caption(metric: Metric) -> str:
    """Return the unit, and whether higher or lower is better."""
    directions = {True: "higher is better", False: "lower is better", None: ""}
    parts = (metric.unit, directions[metric.higher_is_better])
    return ", ".join(filter(None, parts))
