"""Autoencoders: pictures [B, 3, H, W] in [-1, 1] to latents [B, C, h, w], and back.

The latents have about unit variance.
"""

import hashlib
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from sdtrain.errors import StorageError, UserError
from sdtrain.files import atomic_folder
from sdtrain.paths import find_folder

WEIGHTS = "diffusion_pytorch_model.safetensors"


class Autoencoder(nn.Module):
    """A frozen AutoencoderKL with its latent scale, read from a folder in diffusers' layout.

    Args:
        path: the folder, with config.json and safetensors; "data/..." is also looked for in
            sdtrain's own data.
        latent_channels, downsampling: what the folder must hold; a disagreement raises UserError.
        latent_scale: latents are multiplied by it; None takes the `scaling_factor` that lies with
            the weights.
        sample_posterior: draw latents from the posterior, as Stable Diffusion does, or take its
            mean.
        sha256: of the weights file, as a run's config.yaml holds it; None checks nothing.
    """

    frozen = True
    has_unit_variance = True
    """Whether its latents are meant to have unit variance, see `check_latent_scale`."""

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
                f"holds no autoencoder: config.json and {WEIGHTS} are needed, as diffusers writes "
                "them",
                key="model.autoencoder.path",
                value=path,
            )
        self.sha256 = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
        if sha256 is not None and sha256 != self.sha256:
            raise UserError(
                f"holds other weights (sha256 {self.sha256[:12]}) than the run was trained with "
                f"({sha256[:12]}): its latents would not fit",
                key="model.autoencoder.path",
                value=path,
                remedy="Give the folder of the first ones in model.autoencoder.path.",
            )
        config = json.loads((folder / "config.json").read_text())
        _check_size("latent_channels", latent_channels, config["latent_channels"], path)
        halvings = len(config["block_out_channels"]) - 1
        _check_size("downsampling", downsampling, 2**halvings, path)
        self.net = _read_autoencoder(folder, path)
        self.latent_channels = latent_channels
        self.downsampling = downsampling
        self.sample_posterior = sample_posterior
        self.latent_scale = float(
            config["scaling_factor"] if latent_scale is None else latent_scale
        )

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """(C, h, w) for pictures of image_size x image_size.

        Raises UserError where that is no multiple of the downsampling.
        """
        if image_size % self.downsampling:
            raise UserError(
                f"must be a multiple of {self.downsampling}, the autoencoder's downsampling",
                key="data.image_size",
                value=image_size,
            )
        side = image_size // self.downsampling
        return self.latent_channels, side, side

    @torch.no_grad()
    def moments(self, image: Tensor) -> Tensor:
        """[B, 2, C, h, w]: the posterior's mean and standard deviation, before the latent scale."""
        posterior = self.net.encode(image).latent_dist
        return torch.stack([posterior.mean, posterior.std], dim=1)

    def latents_of(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents [B, C, h, w]: the posterior's mean, or mean + std noise, times latent_scale.

        moments [B, 2, C, h, w]; noise [B, C, h, w], standard normal, or None.
        """
        latents = moments[:, 0]
        if noise is not None:
            latents = latents + moments[:, 1] * noise
        return latents * self.latent_scale

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents [B, C, h, w] of pictures [B, 3, H, W] in [-1, 1]; noise as in `latents_of`."""
        return self.latents_of(self.moments(image), noise)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [B, 3, H, W], clamped to [-1, 1]."""
        return self.net.decode(latents / self.latent_scale).sample.clamp(-1, 1)


class Pixels(nn.Module):
    """No autoencoder: diffusion in pixel space. The picture is its own latent."""

    frozen = True
    has_unit_variance = False
    latent_scale = 1.0
    sample_posterior = False
    sha256 = None

    def __init__(self, *, latent_channels: int = 3) -> None:
        super().__init__()
        if latent_channels != 3:
            raise UserError(
                "is not possible: in pixel space it is 3, the colours",
                key="model.autoencoder.latent_channels",
                value=latent_channels,
            )

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        return 3, image_size, image_size

    def moments(self, image: Tensor) -> Tensor:
        return torch.stack([image, torch.zeros_like(image)], dim=1)

    def latents_of(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        return moments[:, 0]

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        return image

    def decode(self, latents: Tensor) -> Tensor:
        return latents.clamp(-1, 1)


def check_latent_scale(autoencoder: Autoencoder | Pixels, latents: Tensor) -> float:
    """Standard deviation of the latents [N, C, h, w] of a calibration batch.

    Raises UserError outside [0.7, 1.4]: the schedule's noise levels are meant for latents of unit
    variance. In pixel space nothing is checked: a picture's own contrast is no mistake.
    """
    std = latents.std().item()
    if getattr(autoencoder, "has_unit_variance", True) and not 0.7 <= std <= 1.4:
        scale = autoencoder.latent_scale
        raise UserError(
            f"The latents of {len(latents)} training pictures have a standard deviation of "
            f"{std:.3g}; between 0.7 and 1.4 is needed. model.autoencoder.latent_scale is "
            f"{scale:.4g}",
            key="model.autoencoder.latent_scale",
            remedy=f"model.autoencoder.latent_scale={scale / std:.4g} would make it 1.",
        )
    return std


def write_autoencoder(
    net: AutoencoderKL, latent_scale: float, folder: Path, measured: dict | None = None
) -> None:
    """Writes an autoencoder in diffusers' layout, and measured.json.

    config.json has the scaling_factor, the weights are in fp16. Raises StorageError where the disk
    refuses; then nothing is left behind.
    """
    config = {key: value for key, value in net.config.items() if not key.startswith("_")}
    config["scaling_factor"] = latent_scale
    config["_class_name"] = "AutoencoderKL"
    weights = {k: v.detach().half().cpu().contiguous() for k, v in net.state_dict().items()}
    try:
        with atomic_folder(folder) as beside:
            (beside / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
            if measured is not None:
                (beside / "measured.json").write_text(json.dumps(measured, indent=1) + "\n")
            save_file(weights, beside / WEIGHTS)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StorageError(
            f"{folder} cannot be written: {reason}",
            key="hydra.run.dir",
            remedy="Free space, and go on with resume=auto.",
        ) from error


def _check_size(name: str, asked: int, found: int, path: str) -> None:
    if asked != found:
        raise UserError(
            f"is not what the autoencoder in {path} has, {found}",
            key=f"model.autoencoder.{name}",
            value=asked,
            remedy=f"Set model.autoencoder.{name}={found}.",
        )


def _read_autoencoder(folder: Path, path: str) -> AutoencoderKL:
    """The network in `folder`, frozen, float32, from safetensors alone."""
    try:
        net = AutoencoderKL.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,
        )
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{WEIGHTS} in it holds no safetensors",
            key="model.autoencoder.path",
            value=path,
            remedy="Give a folder that does in model.autoencoder.path.",
        ) from error
    return net.eval().requires_grad_(False)
