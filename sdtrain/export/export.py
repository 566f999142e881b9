"""The work of sdtrain-export: load a checkpoint and write it as a pipeline with its card."""

from pathlib import Path

from sdtrain.assemble.load import load
from sdtrain.config.schema import ExportConfig
from sdtrain.console import warn
from sdtrain.errors import UserError
from sdtrain.export.card import lost_lines, write_card
from sdtrain.export.pipeline import build_pipeline, write_pipeline
from sdtrain.runs.config import read_config
from sdtrain.runs.layout import CheckpointFolder
from sdtrain.weight_files import quiet_libraries


def export(config: ExportConfig) -> None:
    """Write a complete checkpoint as a pipeline in diffusers' layout, with a model card.

    Raises UserError if it cannot be loaded or has no counterpart in diffusers, or the output folder
    is not empty, and StorageError if it cannot be written.
    """
    folder = Path(config.output)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(
            "is not empty", key="output", value=config.output, remedy="Set output to a new folder."
        )
    checkpoint = CheckpointFolder(Path(config.checkpoint))
    loaded = load(
        checkpoint,
        ema=config.ema,
        device="cpu",
        allow=config.allow,
        autoencoder=config.autoencoder,
        pretrained=config.model["pretrained"],
        keep_frozen_dtype=False,
    )
    saved = read_config(checkpoint.config)
    single_file = config.format == "single_file"
    with quiet_libraries():
        pipeline = build_pipeline(loaded.model, loaded.image_size)
        write_pipeline(pipeline, folder, config.dtype, single_file=single_file)
    write_card(config, loaded, saved)
    for line in lost_lines(saved, loaded.model, single_file=single_file):
        warn(line)
