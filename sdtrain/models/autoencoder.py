"""Autoencoders: picture [B, 3, H, W] in [-1, 1] to latents [B, C, h, w] of about unit variance, and back."""

import hashlib
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from sdtrain.errors import StorageError, UserError
from sdtrain.paths import find_folder
from sdtrain.runs.checkpoint import fsync

WEIGHTS = "diffusion_pytorch_model.safetensors"


class Autoencoder(nn.Module):
    """A frozen AutoencoderKL with its latent scale, read from a folder in diffusers' layout (config.json and safetensors).

    Args:
        path: the folder; "data/..." is also looked for in sdtrain's own data.
        latent_channels, downsampling: what the folder must hold; a disagreement raises UserError.
        latent_scale: latents are multiplied by it; None takes the `scaling_factor` that lies with the weights.
        sample_posterior: draw latents from the posterior, as Stable Diffusion does, or take its mean.
        sha256: of the weights file, as a run's config.yaml holds it; None checks nothing.
    """

    def __init__(
        self,
        *,
        path: str,
        latent_channels: int,
        downsampling: int,
        latent_scale: float | None = None,
        sample_posterior: bool = False,
        sha256: str | None = None,
    ) -> None:
        super().__init__()
        folder = find_folder(path, "model.autoencoder.path")
        if not (folder / "config.json").is_file() or not (folder / WEIGHTS).is_file():
            raise UserError(
                f"model.autoencoder.path={path} holds no autoencoder: config.json and {WEIGHTS} are needed, as diffusers writes them."
            )
        self.sha256 = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
        if sha256 is not None and sha256 != self.sha256:
            raise UserError(
                f"model.autoencoder.path={path} holds other weights (sha256 {self.sha256[:12]}) than the run was trained with "
                f"({sha256[:12]}): its latents would not fit. Give the folder of the first ones in model.autoencoder.path."
            )
        config = json.loads((folder / "config.json").read_text())
        found = {
            "latent_channels": config["latent_channels"],
            "downsampling": 2 ** (len(config["block_out_channels"]) - 1),
        }
        for key, value in {
            "latent_channels": latent_channels,
            "downsampling": downsampling,
        }.items():
            if found[key] != value:
                raise UserError(
                    f"model.autoencoder.{key}={value}, but the autoencoder in {path} has {found[key]}. Set model.autoencoder.{key}={found[key]}."
                )
        how = {
            "local_files_only": True,
            "use_safetensors": True,
            "torch_dtype": torch.float32,
            "low_cpu_mem_usage": False,
        }
        try:
            self.net = AutoencoderKL.from_pretrained(folder, **how).eval().requires_grad_(False)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"model.autoencoder.path={path}: {WEIGHTS} holds no safetensors. Give a folder that does in model.autoencoder.path."
            ) from error
        self.latent_channels, self.downsampling, self.sample_posterior = (
            latent_channels,
            downsampling,
            sample_posterior,
        )
        self.latent_scale = float(
            latent_scale if latent_scale is not None else config["scaling_factor"]
        )

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """(C, h, w) for pictures of image_size x image_size. Raises UserError where that is not a multiple of the downsampling."""
        if image_size % self.downsampling:
            raise UserError(
                f"data.image_size={image_size} must be a multiple of {self.downsampling}, the autoencoder's downsampling."
            )
        return (
            self.latent_channels,
            image_size // self.downsampling,
            image_size // self.downsampling,
        )

    @torch.no_grad()
    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents [B, C, h, w]: the posterior's mean, or with noise [B, C, h, w] mean + std noise, times latent_scale."""
        posterior = self.net.encode(image).latent_dist
        latents = posterior.mean if noise is None else posterior.mean + posterior.std * noise
        return latents * self.latent_scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [B, 3, H, W], clamped to [-1, 1]."""
        return self.net.decode(latents / self.latent_scale).sample.clamp(-1, 1)


class Pixels(nn.Module):
    """No autoencoder: diffusion in pixel space. The picture is its own latent."""

    latent_scale, sample_posterior, sha256 = 1.0, False, None

    def __init__(self, *, latent_channels: int = 3) -> None:
        super().__init__()
        if latent_channels != 3:
            raise UserError(
                f"model.autoencoder.latent_channels={latent_channels}: in pixel space it is 3, the colours."
            )

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        return 3, image_size, image_size

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        return image

    def decode(self, latents: Tensor) -> Tensor:
        return latents.clamp(-1, 1)


def check_latent_scale(autoencoder: Autoencoder | Pixels, image: Tensor) -> float:
    """Standard deviation of the latents of a calibration batch [B, 3, H, W].

    Raises UserError outside [0.7, 1.4]: the schedule's noise levels are meant for latents of unit variance. In pixel space nothing
    is checked: a picture's own contrast is no mistake.
    """
    std = autoencoder.encode(image).std().item()
    if not isinstance(autoencoder, Pixels) and not 0.7 <= std <= 1.4:
        raise UserError(
            f"The latents of {len(image)} training pictures have a standard deviation of {std:.3g}; between 0.7 and 1.4 is needed. "
            f"model.autoencoder.latent_scale is {autoencoder.latent_scale:.4g}; {autoencoder.latent_scale / std:.4g} would make it 1."
        )
    return std


def write_autoencoder(
    net: AutoencoderKL, latent_scale: float, folder: Path, measured: dict | None = None
) -> None:
    """Writes config.json with scaling_factor and fp16 weights, in diffusers' layout, and measured.json. Beside, then renamed: never a half one.

    Raises StorageError where the disk refuses."""
    beside = folder.with_name(f".{folder.name}.tmp")
    config = {k: v for k, v in net.config.items() if not k.startswith("_")} | {
        "scaling_factor": latent_scale,
        "_class_name": "AutoencoderKL",
    }
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        (beside / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
        if measured is not None:
            (beside / "measured.json").write_text(json.dumps(measured, indent=1) + "\n")
        save_file(
            {k: v.detach().half().cpu().contiguous() for k, v in net.state_dict().items()},
            beside / WEIGHTS,
        )
        (beside / WEIGHTS).chmod(0o644)  # safetensors leaves it readable to its owner alone
        for file in beside.iterdir():
            fsync(file)
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise StorageError(
            f"{folder} cannot be written: {getattr(error, 'strerror', None) or error}. Free space, and go on with resume=auto."
        ) from error
