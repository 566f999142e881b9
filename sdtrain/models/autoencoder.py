"""Autoencoders: encode pictures [B, 3, H, W] in [-1, 1] to latents [B, C, h, w], and decode them.

The latents have about unit variance.
"""

import json
import math
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from sdtrain.errors import StorageError, UserError, first_line
from sdtrain.files import atomic_folder
from sdtrain.models.autoencoder_folder import WEIGHTS, AutoencoderFolder, read_autoencoder_folder
from sdtrain.types import PictureSize
from sdtrain.weight_files import FROZEN_DTYPES


class Autoencoder(nn.Module):
    """A frozen AutoencoderKL with its latent scale, read from a folder in diffusers' layout.

    The mean z of its posterior is normalised to (z - mean) latent_scale / std, as in diffusers'
    pipelines. mean is the `shift_factor` (SD3, FLUX) or the `latents_mean` of config.json, and std
    its `latents_std`, for each channel; without them mean is 0 and std is 1.

    Args:
        path: the folder, or that of a pipeline with a subfolder vae/. It holds config.json and
            safetensors, in one file or several, in full or half precision. "data/..." is also
            searched for in sdtrain's own data.
        latent_channels, downsampling: expected values; others in the folder raise UserError. None
            accepts any.
        latent_scale: factor of the latents; None takes the `scaling_factor` of config.json.
        latent_shift: False keeps mean at 0 and std at 1, as earlier versions did.
        sample_posterior: whether to draw latents from the posterior, as Stable Diffusion does, or
            to take its mean.
        sha256: expected hash of the weights, from a run's config.yaml; None checks nothing.
        variant: "fp16" or "bf16" reads the files of that variant; None the first that exists.
        dtype: "fp16" or "bf16" keeps the network in half precision; latents and pictures are
            float32.
    """

    frozen = True
    has_unit_variance = True
    """Whether its latents should have unit variance, see `check_latent_scale`."""

    def __init__(
        self,
        *,
        path: str,
        latent_channels: int | None = None,
        downsampling: int | None = None,
        latent_scale: float | None = None,
        latent_shift: bool = True,
        sample_posterior: bool = False,
        sha256: str | None = None,
        variant: str | None = None,
        dtype: Literal["fp16", "bf16"] | None = None,
    ) -> None:
        super().__init__()
        folder = read_autoencoder_folder(path, variant)
        self.sha256 = folder.sha256
        if sha256 is not None and sha256 != self.sha256:
            raise UserError(
                f"holds other weights (sha256 {self.sha256[:12]}) than the run was trained with "
                f"({sha256[:12]}), which have other latents",
                key="model.autoencoder.path",
                value=path,
                remedy="Set model.autoencoder.path to the folder of the original weights.",
            )
        config = folder.config
        _check_size("latent_channels", latent_channels, folder.latent_channels, path)
        _check_size("downsampling", downsampling, folder.downsampling, path)
        self.files = folder.files
        self.files_sha256 = folder.config_sha256
        self.dtype = getattr(torch, FROZEN_DTYPES[dtype])
        self.net = _read_autoencoder(folder, path, self.dtype)
        self.latent_channels = folder.latent_channels
        self.downsampling = folder.downsampling
        self.sample_posterior = sample_posterior
        self.latent_scale = float(
            config["scaling_factor"] if latent_scale is None else latent_scale
        )
        mean, std = latent_statistics(config, path)
        self.has_latent_shift = bool(mean.any() or (std != 1).any())
        self.latent_shift = latent_shift and self.has_latent_shift
        self.register_buffer("latent_mean", mean, persistent=False)
        self.register_buffer("latent_std", std, persistent=False)

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """Return (C, h, w) for pictures of image_size x image_size.

        Raises UserError if that is not a multiple of the downsampling.
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
        """Return mean and standard deviation of the posterior, before the latent scale.

        image: [B, 3, H, W] in [-1, 1]. The result is [B, 2, C, h, w].
        """
        posterior = self.net.encode(image.to(self.dtype)).latent_dist
        return torch.stack([posterior.mean, posterior.std], dim=1).float()

    def latents_of(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return latents [B, C, h, w] of the posterior's mean, or of mean + std noise.

        moments: [B, 2, C, h, w]. noise: [B, C, h, w], standard normal, or None.
        """
        latents = moments[:, 0]
        if noise is not None:
            latents = latents + moments[:, 1] * noise
        if self.latent_shift:
            latents = (latents - self.latent_mean) / self.latent_std
        return latents * self.latent_scale

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """Encode pictures [B, 3, H, W] in [-1, 1] to latents; noise as in `latents_of`."""
        return self.latents_of(self.moments(image), noise)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [B, C, h, w] to pictures [B, 3, H, W], clamped to [-1, 1]."""
        latents = latents / self.latent_scale
        if self.latent_shift:
            latents = latents * self.latent_std + self.latent_mean
        return self.net.decode(latents.to(self.dtype)).sample.float().clamp(-1, 1)


class Pixels(nn.Module):
    """No autoencoder, for diffusion in pixel space: the latents are the picture itself."""

    frozen = True
    has_unit_variance = False
    latent_scale = 1.0
    sample_posterior = False
    sha256 = None

    def __init__(self, *, latent_channels: int = 3) -> None:
        super().__init__()
        if latent_channels != 3:
            raise UserError(
                "must be 3, the number of colours, in pixel space",
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


def latent_shape_of(autoencoder: nn.Module, size: PictureSize) -> tuple[int, int, int]:
    """Return (C, h, w) of the latents of pictures of this size.

    Only squares are asked for, so that an autoencoder of the user's own need not know rectangles.
    Raises UserError as its `latent_shape` does.
    """
    if isinstance(size, int):
        return autoencoder.latent_shape(size)
    height, width = size
    channels, latent_height, _ = autoencoder.latent_shape(height)
    return channels, latent_height, autoencoder.latent_shape(width)[2]


def check_latent_scale(autoencoder: Autoencoder | Pixels, latents: Tensor) -> float:
    """Return the standard deviation of the latents [N, C, h, w] of a calibration batch.

    Raises UserError outside [0.7, 1.4], because the schedule's noise levels are meant for latents
    of unit variance. Pixel space is not checked: the contrast of pictures is theirs.
    """
    std = latents.std().item()
    if getattr(autoencoder, "has_unit_variance", True) and not 0.7 <= std <= 1.4:
        scale = autoencoder.latent_scale
        raise UserError(
            f"The latents of {len(latents)} training pictures have a standard deviation of "
            f"{std:.3g}; between 0.7 and 1.4 is needed. model.autoencoder.latent_scale is "
            f"{scale:.4g}",
            key="model.autoencoder.latent_scale",
            remedy=f"Set model.autoencoder.latent_scale={scale / std:.4g}, for a deviation of 1.",
        )
    return std


def write_autoencoder(
    net: AutoencoderKL, latent_scale: float, folder: Path, measured: dict | None = None
) -> None:
    """Write an autoencoder in diffusers' layout, with `measured` as measured.json.

    config.json contains the scaling_factor; the weights are in fp16. If writing fails, StorageError
    is raised and nothing is left behind.
    """
    config = {key: value for key, value in net.config.items() if not key.startswith("_")}
    config["scaling_factor"] = latent_scale
    config["_class_name"] = "AutoencoderKL"
    weights = {}
    for name, value in net.state_dict().items():
        weights[name] = value.detach().half().cpu().contiguous()
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
            remedy="Free space, then resume with resume=auto.",
        ) from error


def latent_statistics(config: dict, path: str) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation [C or 1, 1, 1] of the latents according to config.json.

    Raises UserError if only one of them is there, or their number of channels differs.
    """
    shift = config.get("shift_factor")
    mean = config.get("latents_mean")
    std = config.get("latents_std")
    channels = config["latent_channels"]
    fits = shift is None or _is_number(shift)
    if mean is not None or std is not None:
        fits = fits and _are_numbers(mean, channels) and _are_numbers(std, channels)
        fits = fits and min(std) > 0
    if not fits:
        raise UserError(
            f"has a config.json with shift_factor={shift}, latents_mean={mean} and "
            f"latents_std={std}. shift_factor must be a number; latents_mean and latents_std must "
            f"be lists of {channels} numbers, one per channel, those of latents_std positive",
            key="model.autoencoder.path",
            value=path,
            remedy="Correct config.json, or set model.autoencoder.path to another folder.",
        )
    scalar_shift = float(shift or 0)
    if mean is None:
        return torch.full((1, 1, 1), scalar_shift), torch.ones(1, 1, 1)
    return torch.tensor(mean).view(-1, 1, 1) + scalar_shift, torch.tensor(std).view(-1, 1, 1)


def _is_number(value: object) -> bool:
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and math.isfinite(value)


def _are_numbers(values: object, count: int) -> bool:
    return isinstance(values, list) and len(values) == count and all(map(_is_number, values))


def _check_size(name: str, expected: int | None, actual: int, path: str) -> None:
    if expected not in (None, actual):
        raise UserError(
            f"differs from that of the autoencoder in {path}, which is {actual}",
            key=f"model.autoencoder.{name}",
            value=expected,
            remedy=f"Set model.autoencoder.{name}={actual}, or null.",
        )


def _read_autoencoder(folder: AutoencoderFolder, path: str, dtype: torch.dtype) -> AutoencoderKL:
    """Load the network of a folder from safetensors alone, frozen."""
    try:
        net, info = AutoencoderKL.from_pretrained(
            folder.path,
            local_files_only=True,
            use_safetensors=True,
            variant=folder.weights.variant,
            torch_dtype=dtype,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except Exception as error:  # diffusers raises various classes for sizes that do not match
        raise _weights_error(folder, path, first_line(error)) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise _weights_error(folder, path, f"{len(missing)} are missing, such as {missing[0]}")
    return net.eval().requires_grad_(False)


def _weights_error(folder: AutoencoderFolder, path: str, reason: str) -> UserError:
    return UserError(
        f"contains {folder.weights.paths[0].name}, whose weights do not match its config.json: "
        f"{reason}",
        key="model.autoencoder.path",
        value=path,
        remedy="Set model.autoencoder.path to a folder with matching files.",
    )
