"""A pipeline in Stable Diffusion's layout: real classes, a few thousand weights."""

import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdtrain.paths import find_folder

SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
"""As in Stable Diffusion 1.5."""


def make_pipeline(context_dim: int = 16, **scheduler) -> StableDiffusionPipeline:
    """A pipeline with random weights, whose autoencoder is the trained one of the shapes."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(find_folder("data/tokenizer", ""))
    tokenizer.model_max_length = 24
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=context_dim,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=24,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=2,
        cross_attention_dim=context_dim,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    autoencoder = AutoencoderKL.from_pretrained(
        find_folder("data/shapes_autoencoder", ""), low_cpu_mem_usage=False
    )
    return StableDiffusionPipeline(
        vae=autoencoder.float(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**(SCHEDULER | scheduler)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_pipeline(folder: Path, **given) -> Path:
    """make_pipeline(...) in a folder."""
    make_pipeline(**given).save_pretrained(folder)
    return folder


def fill_hub_cache(cache: Path, pipelines: dict[str, Path]) -> Path:
    """Make the cache of the Hugging Face hub with OWNER/NAME. pipelines: {branch: its pipeline}.

    Returns the folder with a copy of each, named after its branch, as if that were its commit.
    """
    repository = cache / "models--OWNER--NAME"
    (repository / "refs").mkdir(parents=True)
    for branch, pipeline in pipelines.items():
        (repository / "refs" / branch).write_text(branch)
        shutil.copytree(pipeline, repository / "snapshots" / branch)
    return repository / "snapshots"
