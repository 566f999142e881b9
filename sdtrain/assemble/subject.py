"""Load a checkpoint or a pipeline as the subject of metrics."""

from pathlib import Path

from omegaconf import MISSING

from sdtrain.assemble.drawing import build_drawing
from sdtrain.assemble.load import load, pick_device
from sdtrain.assemble.load_pipeline import load_pipeline, warn_of_options_of_runs
from sdtrain.assemble.model import data_arguments
from sdtrain.assemble.training_data import TrainingData, with_changes
from sdtrain.config.check import Checker, import_target
from sdtrain.config.compose import PRIMARY, compose_config
from sdtrain.config.schema import EvaluateConfig
from sdtrain.errors import UserError
from sdtrain.evaluation.subject import Subject
from sdtrain.models.pipeline_folder import is_pipeline
from sdtrain.runs.layout import CheckpointFolder

PIPELINE_GUIDANCE = 3.0
"""Default guidance scale of a pipeline: that of sdtrain's runs."""

OPTION = "option"
"""Key of config.data under which `data=NAME` of the command line is."""


def load_subject(config: EvaluateConfig, path: Path) -> Subject:
    """Load the model of a complete checkpoint or of a pipeline, and build how it draws.

    Raises UserError if either fails.
    """
    if is_pipeline(path):
        return _load_pipeline_subject(config, path)
    if OPTION in config.data:
        raise UserError(
            f"has no effect: checkpoint={path} is a run, which names its own data",
            key="data",
            value=config.data[OPTION],
            remedy="Remove it, or set data.path if its pictures have moved.",
        )
    loaded = load(
        CheckpointFolder(path),
        ema=config.ema,
        device=pick_device(config.accelerator),
        allow=config.allow,
        autoencoder=config.autoencoder,
        pretrained=config.model["pretrained"],
        data=config.data,
    )
    scale = config.guidance_scale
    if scale is None:
        scale = loaded.cfg["guidance_scale"]
    settings = vars(config) | {"guidance_scale": scale}
    return Subject(
        model=loaded.model,
        drawing=build_drawing(settings, loaded.model.objective.schedule),
        image_size=loaded.image_size,
        num_images=config.num_images,
        seed=config.seed,
        data_source=loaded.training_data,
        record=loaded.record,
    )


def _load_pipeline_subject(config: EvaluateConfig, path: Path) -> Subject:
    """Load a pipeline with the data that the command names, at the pipeline's size of pictures."""
    warn_of_options_of_runs(config)
    changes = dict(config.data)
    option = changes.pop(OPTION, None)
    if option is None:
        raise UserError(
            f"data is missing: checkpoint={path} is a pipeline, which has no data of its own",
            key="data",
            remedy="Add data=images data.path=FOLDER, or data=dataset data.path=FILES.",
        )
    composed = compose_config(PRIMARY, [f"data={option}"])["data"]
    node = {key: value for key, value in composed.items() if value != MISSING}
    typed = {f"data.{key}" for key in changes}
    arguments = with_changes(data_arguments(node), changes)
    Checker(typed).call(arguments, "data", import_target(node, "data"))
    model, image_size = load_pipeline(path, pick_device(config.accelerator))
    node["image_size"] = changes.get("image_size", image_size)
    scale = PIPELINE_GUIDANCE if config.guidance_scale is None else config.guidance_scale
    return Subject(
        model=model,
        drawing=build_drawing(vars(config) | {"guidance_scale": scale}, model.objective.schedule),
        image_size=node["image_size"],
        num_images=config.num_images,
        seed=config.seed,
        data_source=TrainingData(node, changes, config.allow, record=None),
    )
