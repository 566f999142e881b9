"""Autoencoders: pictures [B, 3, H, W] in [-1, 1] to latents [B, C, h, w], and back.

The latents have about unit variance.
"""

import json
import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from sdtrain.errors import StorageError, UserError
from sdtrain.files import atomic_folder
from sdtrain.models.autoencoder_folder import WEIGHTS, AutoencoderFolder, read_autoencoder_folder


class Autoencoder(nn.Module):
    """A frozen AutoencoderKL with its latent scale, read from a folder in diffusers' layout.

    Its posterior's mean z becomes (z - mean) latent_scale / std and back, as diffusers' pipelines
    have it: mean is the `shift_factor` of config.json (SD3, FLUX), or its `latents_mean`, and std
    its `latents_std` (channel by channel); 0 and 1 where it has none.

    Args:
        path: the folder, or one of a pipeline that has it as vae/; with config.json and
            safetensors, whole or in parts, in full or half precision; "data/..." is also looked for
            in sdtrain's own data.
        latent_channels, downsampling: what the folder must hold; a disagreement raises UserError,
            None takes what is there.
        latent_scale: latents are multiplied by it; None takes the `scaling_factor` that lies with
            the weights.
        latent_shift: False leaves mean at 0 and std at 1, as earlier versions did.
        sample_posterior: draw latents from the posterior, as Stable Diffusion does, or take its
            mean.
        sha256: of the weights, as a run's config.yaml holds it; None checks nothing.
    """

    frozen = True
    has_unit_variance = True
    """Whether its latents are meant to have unit variance, see `check_latent_scale`."""

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
    ) -> None:
        super().__init__()
        found = read_autoencoder_folder(path)
        self.sha256 = found.sha256
        if sha256 is not None and sha256 != self.sha256:
            raise UserError(
                f"holds other weights (sha256 {self.sha256[:12]}) than the run was trained with "
                f"({sha256[:12]}): its latents would not fit",
                key="model.autoencoder.path",
                value=path,
                remedy="Give the folder of the first ones in model.autoencoder.path.",
            )
        config = found.config
        _check_size("latent_channels", latent_channels, found.latent_channels, path)
        _check_size("downsampling", downsampling, found.downsampling, path)
        self.files = found.files
        self.files_sha256 = found.config_sha256
        self.net = _read_autoencoder(found, path)
        self.latent_channels = found.latent_channels
        self.downsampling = found.downsampling
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
        """Latents [B, C, h, w] of the posterior's mean, or of mean + std noise.

        moments [B, 2, C, h, w]; noise [B, C, h, w], standard normal, or None.
        """
        latents = moments[:, 0]
        if noise is not None:
            latents = latents + moments[:, 1] * noise
        if self.latent_shift:
            latents = (latents - self.latent_mean) / self.latent_std
        return latents * self.latent_scale

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents [B, C, h, w] of pictures [B, 3, H, W] in [-1, 1]; noise as in `latents_of`."""
        return self.latents_of(self.moments(image), noise)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [B, 3, H, W], clamped to [-1, 1]."""
        latents = latents / self.latent_scale
        if self.latent_shift:
            latents = latents * self.latent_std + self.latent_mean
        return self.net.decode(latents).sample.clamp(-1, 1)


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


def latent_statistics(config: dict, path: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [C or 1, 1, 1] that a config.json says its latents have.

    Raises UserError where it says only half of it, or of another number of channels.
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
            f"has a config.json whose shift_factor={shift}, latents_mean={mean} and "
            f"latents_std={std} are no number, and no mean and standard deviation of its "
            f"{channels} channels",
            key="model.autoencoder.path",
            value=path,
            remedy="Correct them, or give another folder in model.autoencoder.path.",
        )
    whole_shift = float(shift or 0)
    if mean is None:
        return torch.full((1, 1, 1), whole_shift), torch.ones(1, 1, 1)
    return torch.tensor(mean).view(-1, 1, 1) + whole_shift, torch.tensor(std).view(-1, 1, 1)


def _is_number(value: object) -> bool:
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and math.isfinite(value)


def _are_numbers(values: object, count: int) -> bool:
    return isinstance(values, list) and len(values) == count and all(map(_is_number, values))


def _check_size(name: str, asked: int | None, found: int, path: str) -> None:
    if asked not in (None, found):
        raise UserError(
            f"is not what the autoencoder in {path} has, {found}",
            key=f"model.autoencoder.{name}",
            value=asked,
            remedy=f"Set model.autoencoder.{name}={found}, or null.",
        )


def _read_autoencoder(found: AutoencoderFolder, path: str) -> AutoencoderKL:
    """The network in a folder, frozen, float32, from safetensors alone."""
    try:
        net, info = AutoencoderKL.from_pretrained(
            found.folder,
            local_files_only=True,
            use_safetensors=True,
            variant=found.variant,
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except Exception as error:  # whatever diffusers raises for sizes that do not belong together
        first_line = (str(error).splitlines() or [""])[0]
        raise _unfit_weights(found, path, first_line) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise _unfit_weights(found, path, f"{len(missing)} are missing, as {missing[0]}")
    return net.eval().requires_grad_(False)


def _unfit_weights(found: AutoencoderFolder, path: str, reason: str) -> UserError:
    return UserError(
        f"{found.weights[0].name} in it does not hold the weights of its config.json: {reason}",
        key="model.autoencoder.path",
        value=path,
        remedy="Give a folder that does in model.autoencoder.path.",
    )
