"""The work of sdtrain-export: load a checkpoint and write it as a pipeline with its card."""

from pathlib import Path

import torch

from sdtrain.adapters.embedding_file import EMBEDDING, write_embedding
from sdtrain.adapters.interface import networks_of
from sdtrain.assemble.load import load
from sdtrain.config.schema import ExportConfig
from sdtrain.console import warn
from sdtrain.errors import UserError
from sdtrain.export.card import lost_lines, write_card
from sdtrain.export.pipeline import DTYPES, build_pipeline, write_pipeline
from sdtrain.latent_diffusion import LatentDiffusion
from sdtrain.runs.config import read_config
from sdtrain.runs.layout import CheckpointFolder
from sdtrain.weight_files import quiet_libraries

LORA_LAYOUTS = ("diffusers", "kohya")


def export(config: ExportConfig) -> str:
    """Write a complete checkpoint as a pipeline in diffusers' layout, with a model card, or its
    adapter alone. Return what was written, for a line to the user.

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
    dtype = DTYPES[config.dtype]
    if config.format == "embedding":
        return _write_embedding(loaded.model, saved, folder, dtype)
    if config.format in LORA_LAYOUTS:
        # Here, because peft takes two seconds to import.
        from sdtrain.adapters.lora_file import FILE, write_lora

        write_lora(networks_of(loaded.model), folder, config.format, dtype)
        if config.format == "kohya" and saved["adapter"].get("dora"):
            warn(
                "diffusers reads such a file without the magnitudes of a DoRA. format=diffusers "
                "keeps them."
            )
        return f"A LoRA, {FILE},"
    if saved.get("adapter"):
        from sdtrain.adapters.merge import merge_adapter

        _check_is_mergeable(saved, config)
        for network in networks_of(loaded.model).values():
            merge_adapter(network)
    single_file = config.format == "single_file"
    with quiet_libraries():
        pipeline = build_pipeline(loaded.model, loaded.image_size)
        write_pipeline(pipeline, folder, config.dtype, single_file=single_file)
    write_card(config, loaded, saved)
    for line in lost_lines(saved, loaded.model, single_file=single_file):
        warn(line)
    return "A Stable Diffusion pipeline, with its card README.md,"


def _check_is_mergeable(saved: dict, config: ExportConfig) -> None:
    """Raise UserError for a new word in a single file, whose table of tokens has a fixed size."""
    word = saved["adapter"].get("word")
    if word is not None and config.format == "single_file":
        raise UserError(
            f"cannot hold the new word {word}: programs that read such a file know no other "
            "tokens than those of Stable Diffusion",
            key="format",
            value=config.format,
            remedy="Set format=embedding, and give them that file, or format=folder.",
        )


def _write_embedding(model: LatentDiffusion, saved: dict, folder: Path, dtype: torch.dtype) -> str:
    """Write the new word of a run with adapter=textual_inversion, and return what was written.

    Raises UserError for another run.
    """
    word = (saved.get("adapter") or {}).get("word")
    rows = [value for name, value in model.trained_state().items() if name.endswith(".rows")]
    if word is None or len(rows) != 1:
        raise UserError(
            "does not work: the run has learned no word",
            key="format",
            value="embedding",
            remedy="Set format=folder, or give a run with adapter=textual_inversion.",
        )
    write_embedding(folder / EMBEDDING, word, rows[0].to(dtype))
    return f"The embedding of {word}, {EMBEDDING},"
