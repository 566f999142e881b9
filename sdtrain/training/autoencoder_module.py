"""Trains the autoencoder, the first stage of a latent diffusion model (Rombach et al. 2022, section
3.1).
"""

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from sdtrain.errors import UserError
from sdtrain.models.multiplications import multiplications
from sdtrain.training.optimisation import Optimisation, OptimisedModule
from sdtrain.training.progress import Progress
from sdtrain.types import Batch


def reconstruction_loss(output: Tensor, image: Tensor, edge_weight: float) -> Tensor:
    """Return the loss per sample [B]: mean |error| plus edge_weight times the mean |error| of the
    horizontal and vertical differences.

    The second term penalises a blurred edge at each pixel that it is spread over; the mean |error|
    alone hardly does.
    """
    error = output - image
    edges = error.diff(dim=-1).abs().mean((1, 2, 3)) + error.diff(dim=-2).abs().mean((1, 2, 3))
    return error.abs().mean((1, 2, 3)) + edge_weight * edges


def psnr(output: Tensor, image: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio per picture [B] in dB, for pictures in [-1, 1] (peak
    2).
    """
    return 10 * torch.log10(4 / (output.clamp(-1, 1) - image).square().mean((1, 2, 3)))


class AutoencoderModule(OptimisedModule):
    """A small AutoencoderKL trained on reconstruction, edges and a weak KL term.

    Args:
        latent_channels, block_channels, layers_per_block, norm_groups, mid_attention: arguments of
            the AutoencoderKL; each entry of block_channels after the first halves the resolution.
        edge_weight, kl_weight: weights of the two terms added to the mean |error|. The KL is a mean
            over latent elements.
        optimisation: optimizer, learning rate and clipping.
        progress: progress of the run.
    """

    def __init__(
        self,
        *,
        latent_channels: int,
        block_channels: list[int],
        layers_per_block: int,
        norm_groups: int,
        mid_attention: bool,
        edge_weight: float,
        kl_weight: float,
        optimisation: Optimisation,
        progress: Progress,
    ) -> None:
        super().__init__()
        for channels in block_channels:
            if channels % norm_groups:
                raise UserError(
                    f"must each be a multiple of model.norm_groups={norm_groups}",
                    key="model.block_channels",
                    value=block_channels,
                )
        depth = len(block_channels)
        self.net: nn.Module = AutoencoderKL(
            latent_channels=latent_channels,
            block_out_channels=tuple(block_channels),
            layers_per_block=layers_per_block,
            down_block_types=("DownEncoderBlock2D",) * depth,
            up_block_types=("UpDecoderBlock2D",) * depth,
            norm_num_groups=norm_groups,
            mid_block_add_attention=mid_attention,
        )
        self.optimisation = optimisation
        self.progress = progress
        self.edge_weight = edge_weight
        self.kl_weight = kl_weight
        self.latent_channels = latent_channels
        self.downsampling = 2 ** (depth - 1)

    def trained(self) -> dict[str, nn.Parameter]:
        return dict(self.named_parameters())

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """Return (C, h, w) of the posterior for pictures of image_size x image_size.

        Raises UserError if the blocks cannot halve image_size that often.
        """
        if image_size % self.downsampling:
            raise UserError(
                f"must be a multiple of {self.downsampling}: "
                "model.block_channels halves it at each step",
                key="data.image_size",
                value=image_size,
            )
        side = image_size // self.downsampling
        return self.latent_channels, side, side

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        posterior = self.net.encode(batch.image).latent_dist
        output = self.net.decode(posterior.mean + posterior.std * batch.posterior).sample
        # KL(N(mean, std^2) || N(0, 1)) per latent element.
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean((1, 2, 3))
        losses = reconstruction_loss(output, batch.image, self.edge_weight) + self.kl_weight * kl
        return self.record_losses(batch, losses, times=None)

    def reconstruct(self, image: Tensor) -> Tensor:
        """Encode pictures [B, 3, H, W] and decode the mean of the posterior."""
        return self.net.decode(self.net.encode(image).latent_dist.mean).sample

    @torch.no_grad()
    def validate(self, batch: Batch) -> dict[str, Tensor]:
        """Return the PSNR in dB of each reconstruction [B]."""
        return {"psnr": psnr(self.reconstruct(batch.image), batch.image)}

    def multiplications(self, batch: Batch) -> tuple[float, float, float]:
        """Return the multiplications for the pictures of a batch, as (the autoencoder's, 0, 0):
        no frozen autoencoder encodes or decodes for it.
        """
        return multiplications(self.net, lambda: self.validate(batch)), 0.0, 0.0
