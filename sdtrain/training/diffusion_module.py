"""Trains a noise predictor: LatentDiffusion under Lightning. No formula stands here."""

import torch
from torch import Tensor, nn

from sdtrain.latent_diffusion import LatentDiffusion
from sdtrain.models.multiplications import multiplications
from sdtrain.training.optimisation import Optimisation, OptimisedModule
from sdtrain.training.progress import Progress
from sdtrain.types import Batch


class DiffusionModule(OptimisedModule):
    """Checkpoints hold the model's own names, without a prefix.

    Args:
        model: what is trained.
        optimisation: learning rate and clipping.
        progress: where the run stands.
    """

    def __init__(
        self, *, model: LatentDiffusion, optimisation: Optimisation, progress: Progress
    ) -> None:
        super().__init__()
        self.model = model
        self.optimisation = optimisation
        self.progress = progress

    def trained(self) -> dict[str, nn.Parameter]:
        return self.model.trained_parameters()

    def state_dict(self) -> dict[str, Tensor]:
        return self.model.trained_state()

    def load_state_dict(self, state_dict: dict[str, Tensor], strict: bool = True) -> None:
        self.model.load_trained_state(state_dict)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        losses = self.model.losses(batch)
        return self.record_losses(batch, losses.per_sample, losses.t)

    @torch.no_grad()
    def validate(self, batch: Batch) -> dict[str, Tensor]:
        """Per sample [B]: the training loss at the batch's own draws, captions dropped as in
        training.
        """
        return {"loss": self.model.losses(batch).per_sample}

    def multiplications(self, batch: Batch) -> tuple[float, float, float]:
        """(of the unet, of the autoencoder's encoder, of its decoder), for a batch's pictures."""
        model = self.model
        network = multiplications(model.unet, lambda: self.validate(batch))
        encoder = 0.0
        if batch.moments is None:
            encoder = multiplications(model.autoencoder, lambda: model.latents(batch.image))
        latents = torch.zeros_like(batch.noise)
        decoder = multiplications(model.autoencoder, lambda: model.autoencoder.decode(latents))
        if not network:
            # Without layers that can be counted: each of its weights at each place.
            places = latents[0, 0].numel() * len(latents)
            network = max(1, sum(p.numel() for p in model.unet.parameters())) * places
        return network, encoder, decoder
