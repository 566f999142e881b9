"""The work of sdtrain-export: load a checkpoint and write it as a pipeline with its card."""

from pathlib import Path

from sdtrain.assemble.load import load
from sdtrain.config.schema import ExportConfig
from sdtrain.console import warn
from sdtrain.errors import UserError
from sdtrain.export.card import lost_lines, write_card
from sdtrain.export.pipeline import build_pipeline, quiet_libraries, write_pipeline
from sdtrain.files import check_writable
from sdtrain.runs.config import read_config
from sdtrain.runs.layout import CheckpointFolder


def export(config: ExportConfig) -> None:
    """Write a complete checkpoint as a pipeline in diffusers' layout, with a model card.

    Raises UserError if it cannot be loaded or has no counterpart in diffusers, or the output folder
    is not empty, and StorageError if it cannot be written.
    """
    quiet_libraries()
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
    pipeline = build_pipeline(loaded.model, loaded.image_size)
    check_writable(folder)
    saved = read_config(checkpoint.config)
    write_pipeline(pipeline, folder, config.dtype)
    write_card(config, loaded, saved)
    for line in lost_lines(saved):
        warn(line)
