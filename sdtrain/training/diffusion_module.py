"""Trains a noise predictor: latents, condition, objective. No formula stands here."""

import torch
from torch import Tensor, nn

from sdtrain.diffusion import Network, Objective
from sdtrain.training.optimisation import Optimisation, OptimisedModule
from sdtrain.types import Batch, Conditioning, Losses


class DiffusionModule(OptimisedModule):
    """A unet and a conditioner trained together, behind a frozen autoencoder.

    Args:
        unet: forward(x [B, C, h, w], timestep [B], context [B, L, D]) -> [B, C, h, w].
        conditioner: forward(captions, labels [B], drop [B]) -> Conditioning.
        autoencoder: encode, decode, latent_shape; not trained and not in the checkpoints.
        objective: turns latents, noise and u into losses.
        optimisation: learning rate and clipping.
        caption_dropout: share of samples that are trained without their caption, for classifier-free guidance.
    """

    def __init__(
        self,
        *,
        unet: nn.Module,
        conditioner: nn.Module,
        autoencoder: nn.Module,
        objective: Objective,
        optimisation: Optimisation,
        caption_dropout: float,
    ) -> None:
        super().__init__()
        if not 0 <= caption_dropout <= 1:
            raise ValueError(f"model.caption_dropout={caption_dropout:g} must lie in [0, 1].")
        self.unet, self.conditioner, self.objective, self.optimisation = (
            unet,
            conditioner,
            objective,
            optimisation,
        )
        self.caption_dropout = caption_dropout
        self._frozen = [
            autoencoder
        ]  # in a list: nn.Module would put it into state_dict, DDP and the optimizer
        self.norm, self.per_sample, self.window_loss, self.times = None, None, 0.0, None

    @property
    def autoencoder(self) -> nn.Module:
        return self._frozen[0].to(self.device)

    def trained(self) -> dict[str, nn.Parameter]:
        """Every parameter that training moves, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def network(self, conditioning: Conditioning) -> Network:
        """The unet with its conditioning bound: (x, timestep) -> output."""
        return lambda x, timestep: self.unet(x, timestep, conditioning.context)

    def losses(self, batch: Batch) -> Losses:
        latents = self.autoencoder.encode(batch.image, batch.posterior)
        conditioning = self.conditioner(
            batch.caption, batch.label, batch.drop < self.caption_dropout
        )
        return self.objective(
            self.network(conditioning), latents, batch.noise, batch.u, batch.input_noise
        )

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        self.trainer.datamodule.images_seen = batch.stream_end
        losses = self.losses(batch)
        self.times, self.per_sample = (
            losses.t,
            losses.per_sample.detach(),
        )  # read by a callback: self.log would wait for the host in every step
        self.window_loss = self.window_loss + self.per_sample.sum()
        return losses.per_sample.mean()

    @torch.no_grad()
    def validate(self, batch: Batch) -> dict[str, Tensor]:
        """Per sample [B]: the training loss at the batch's own draws, captions dropped as in training."""
        return {"loss": self.losses(batch).per_sample}

    @torch.no_grad()
    def epsilon_error(
        self, latents: Tensor, captions: list[str], labels: Tensor, noise: Tensor, log_snr: Tensor
    ) -> Tensor:
        """Mean squared error of epsilon [B] at levels log_snr [B] inside the schedule's range, no caption dropped."""
        conditioning = self.conditioner(
            captions, labels, torch.zeros(len(latents), dtype=torch.bool, device=latents.device)
        )
        return self.objective.epsilon_error(
            self.network(conditioning), latents, noise, self.objective.schedule.time_of(log_snr)
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimisation.configure(self.trained().values())
