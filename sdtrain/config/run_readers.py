"""Check the configurations of the commands that read a run: sdtrain-sample, sdtrain-evaluate and
sdtrain-export.

The checks that need no torch come before the first one that imports it.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdtrain.config.check import Checker, import_target
from sdtrain.config.overrides import typed_keys
from sdtrain.config.path_keys import expand_homes_in_config
from sdtrain.config.schema import EvaluateConfig, ExportConfig, SampleConfig
from sdtrain.console import warn
from sdtrain.errors import UserError
from sdtrain.models.hub import find_checkpoint_pipeline
from sdtrain.models.pipeline_folder import DEPTH_ESTIMATOR, is_pipeline
from sdtrain.paths import HUB_ID, absolute_path, shipped_data
from sdtrain.runs.config import read_config
from sdtrain.runs.layout import CheckpointFolder, SweepFolder
from sdtrain.runs.manifest import find_checkpoint

SAMPLING_NODES = ("sampler", "grid", "guidance")
"""The nodes that say how a sample is drawn."""

DEFAULT_STRENGTH = 0.6
"""Strength of image-to-image without a mask."""


def check_sample(config: dict, overrides: Iterable[str]) -> SampleConfig:
    """Check a resolved configuration of `sdtrain-sample`. Raises UserError.

    In the returned one, `checkpoint` is the folder of an intact checkpoint or a pipeline, and
    `prompt` a list of all prompts: those that were typed, then those of prompt_file.
    """
    typed = typed_keys(overrides)
    config = expand_homes_in_config(config)
    # Nothing is filled in at the root: there, these names are keys of the user's.
    Checker(typed, filled_in=()).call(config, "", SampleConfig)
    checked = SampleConfig(**config)
    _check_start(checked, typed)
    _check_adapters(checked)
    folder = _find_source(checked.checkpoint)
    checked = replace(
        checked,
        checkpoint=str(folder),
        prompt=as_list(checked.prompt) + _read_prompts(checked.prompt_file),
        label=as_list(checked.label),
        strength=_strength(checked),
        depth_model=_depth_model(checked, folder),
    )
    _remove_bound(config, folder, typed)
    # From here on torch is imported, by the targets.
    return replace(checked, **_check_nodes(config, SAMPLING_NODES, Checker(typed)))


def _check_start(config: SampleConfig, typed: set[str]) -> None:
    """Raise UserError for files that do not exist, and for keys without effect."""

    def refuse(problem: str, key: str, remedy: str) -> None:
        raise UserError(problem, key=key, value=getattr(config, key), remedy=remedy)

    if config.depth is not None and not (config.depth and Path(config.depth).exists()):
        refuse("does not exist", "depth", "Set it to a grey picture or a folder of them.")
    if config.depth_model is not None and config.depth is not None:
        refuse(f"has no effect with depth={config.depth}", "depth_model", "Remove one of them.")
    if config.depth_model is not None and config.init_image is None:
        refuse("has no effect without init_image", "depth_model", "Set init_image, or remove it.")
    if config.init_image is None:
        for key in ("mask", "strength"):
            if key in typed and getattr(config, key) is not None:
                refuse("has no effect without init_image", key, "Set init_image, or remove it.")
    elif not config.init_image or not Path(config.init_image).exists():
        refuse("does not exist", "init_image", "Set it to a picture or a folder of pictures.")
    elif config.mask is not None and not Path(config.mask).is_file():
        refuse("is no file", "mask", "Set it to a picture, or remove it.")
    elif config.mask is not None and config.strength == 0:
        refuse("has no effect at strength=0", "mask", "Remove it, or raise strength.")
    elif config.attention and config.strength == 0:
        refuse(
            "has no effect at strength=0, at which the network is not run",
            "attention",
            "Remove it, or raise strength.",
        )
    elif config.save_latents:
        refuse(
            "would write noise, from which alone these pictures are not drawn",
            "save_latents",
            "Remove it, or init_image.",
        )


def _check_adapters(config: SampleConfig) -> None:
    """Raise UserError for files that do not exist, and for weights that belong to no LoRA."""
    for key in ("embedding", "lora"):
        for path in as_list(getattr(config, key)):
            if not (path and Path(path).exists()):
                raise UserError(
                    "does not exist", key=key, value=path, remedy=f"Set {key} to a file."
                )
    for weight in as_list(config.lora_weight):
        if not math.isfinite(weight):
            raise UserError("must be finite", key="lora_weight", value=weight)
    files = as_list(config.lora)
    weights = as_list(config.lora_weight)
    if weights and len(weights) != len(files):
        raise UserError(
            f"is set {len(weights)} times, and lora {len(files)} times",
            key="lora_weight",
            value=weights,
            remedy="Set it once for each lora, in their order, or not at all.",
        )


def _strength(config: SampleConfig) -> float:
    """Return the strength, filled in if it is null. Raises UserError if it leaves no step."""
    if config.init_image is None:
        return 1.0
    strength = config.strength
    if strength is None:
        strength = DEFAULT_STRENGTH if config.mask is None else 1.0
    if strength > 0 and int(config.steps * strength) == 0:
        raise UserError(
            f"leaves none of steps={config.steps} to run",
            key="strength",
            value=strength,
            remedy="Raise strength or steps, or set strength=0 to encode and decode init_image.",
        )
    return strength


def _depth_model(config: SampleConfig, checkpoint: Path) -> str | None:
    """Return the depth model, filled in if it is null: that of the run or of the pipeline, or None
    if there is none.
    """
    if config.depth_model is not None:
        return absolute_path(config.depth_model, may_be_hub_id=True)
    own = CheckpointFolder(checkpoint).config
    if own.is_file():
        return read_config(own)["data"].get("depth_model")
    if (checkpoint / DEPTH_ESTIMATOR).is_dir():
        return str(checkpoint)
    return None


def _find_source(checkpoint: str) -> Path:
    """Return the folder of an intact checkpoint, or a pipeline. Raises UserError.

    A pipeline on the hub, OWNER/NAME, is returned as the folder of its local copy; data/NAME may be
    one of sdtrain's own data.
    """
    path = Path(checkpoint)
    if not path.exists():
        path = shipped_data(checkpoint) or path
    if is_pipeline(path):
        return path
    if HUB_ID.fullmatch(checkpoint) and not path.exists():
        return find_checkpoint_pipeline(path)
    return find_checkpoint(path)


def _remove_bound(config: dict, checkpoint: Path, typed: set[str]) -> None:
    """Set guidance.max_std to null, unless it was typed, for a pipeline, which diffusers draws with
    no bound, and for a run whose own samples had none.
    """
    guidance = config["guidance"]
    if "guidance.max_std" in typed or "max_std" not in guidance:
        return
    own = CheckpointFolder(checkpoint).config
    if own.is_file():
        saved = read_config(own).get("guidance") or {}
        if saved.get("max_std", 0) is None:
            guidance["max_std"] = None
    elif is_pipeline(checkpoint):
        guidance["max_std"] = None


def check_export(config: dict, overrides: Iterable[str]) -> ExportConfig:
    """Check a resolved configuration of `sdtrain-export`. Raises UserError.

    In the returned one, `checkpoint` is the folder of an intact checkpoint.
    """
    config = expand_homes_in_config(config)
    Checker(typed_keys(overrides), filled_in=()).call(config, "", ExportConfig)
    checked = ExportConfig(**config)
    return replace(checked, checkpoint=str(find_checkpoint(Path(checked.checkpoint))))


def check_evaluate(config: dict, overrides: Iterable[str]) -> EvaluateConfig:
    """Check a resolved configuration of `sdtrain-evaluate`. Raises UserError.

    In the returned one, `checkpoint` is a sweep, an intact checkpoint or a pipeline.
    """
    typed = typed_keys(overrides)
    config = expand_homes_in_config(config)
    if "metric" in config:
        raise UserError(
            "There is no key 'metric': a yaml of configs/metric/ belongs under `metrics`",
            key="metric",
            remedy="Begin the yaml with the line `# @package metrics.NAME`.",
        )
    # As in check_sample.
    Checker(typed, filled_in=()).call(config, "", EvaluateConfig)
    checked = EvaluateConfig(**config)
    folder = Path(checked.checkpoint)
    if not SweepFolder(folder).record.is_file():
        folder = _find_source(checked.checkpoint)
    checked = replace(checked, checkpoint=str(folder))
    _remove_bound(config, folder, typed)
    # From here on torch is imported, by the targets.
    # A metric gets nothing from sdtrain, so all of its arguments can be configured.
    metrics = _check_nodes(config, ["metrics"], Checker(typed, filled_in=()))
    if "steps" in typed:
        _check_steps_are_used(metrics["metrics"])
    sampling = _check_nodes(config, SAMPLING_NODES, Checker(typed))
    return replace(checked, **metrics, **sampling)


def _check_steps_are_used(metrics: dict) -> None:
    """Raise UserError if `steps` was typed but every metric has its own number of steps."""
    for name, node in metrics.items():
        if not getattr(import_target(node, f"metrics.{name}"), "own_steps", False):
            return
    raise UserError(
        "steps has no effect: each chosen metric has a number of steps of its own "
        f"({', '.join(metrics)})",
        key="steps",
        remedy=f"Remove steps, or set metrics.{next(iter(metrics))}.steps in its place.",
    )


def as_list(value: Any) -> list:
    """Return the values of a key that may hold one value, several or null."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _read_prompts(prompt_file: str | None) -> list[str]:
    """Return the lines of the file that are not empty; [] without a file."""
    if prompt_file is None:
        return []
    try:
        lines = Path(prompt_file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot be read as UTF-8 text: {error}",
            key="prompt_file",
            value=prompt_file,
            remedy="Set it to a file with one prompt a line.",
        ) from error
    return [line.strip() for line in lines if line.strip()]


def _check_nodes(config: dict, names: Iterable[str], checker: Checker) -> dict[str, Any]:
    """Return {name: checked copy of the node}, and print the checker's notes as warnings."""
    checked = {}
    for name in names:
        checked[name] = checker.node(config[name], name)
    for note in checker.notes:
        warn(note)
    return checked
