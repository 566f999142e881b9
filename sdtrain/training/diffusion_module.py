"""Trains a noise predictor: wraps LatentDiffusion for Lightning. Contains no formulas."""

import torch
from torch import Tensor, nn

from sdtrain.latent_diffusion import LatentDiffusion
from sdtrain.models.multiplications import multiplications
from sdtrain.training.optimisation import Optimisation, OptimisedModule
from sdtrain.training.progress import Progress
from sdtrain.types import Batch


class DiffusionModule(OptimisedModule):
    """Trains a LatentDiffusion. Checkpoints hold the model's own parameter names, without a prefix.

    Args:
        model: the model to train.
        optimisation: optimizer, learning rate and clipping.
        progress: progress of the run.
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
        # Lightning keeps this dictionary until the optimizer is restored: for a model of a billion
        # weights, gigabytes beside the average and the optimizer's state.
        state_dict.clear()

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        losses = self.model.losses(batch)
        return self.record_losses(batch, losses.per_sample, losses.t)

    @torch.no_grad()
    def validate(self, batch: Batch) -> dict[str, Tensor]:
        """Return the training loss per sample [B], with the noise, times and dropped captions of
        the batch.
        """
        return {"loss": self.model.losses(batch).per_sample}

    def multiplications(self, batch: Batch) -> tuple[float, float, float]:
        """Return the multiplications of (unet, autoencoder's encoder, its decoder) for the pictures
        of a batch.
        """
        model = self.model
        network = multiplications(model.unet, lambda: self.validate(batch))
        encoder = 0.0
        if batch.moments is None:
            encoder = multiplications(model.autoencoder, lambda: model.latents(batch.image))
        latents = torch.zeros_like(batch.noise)
        decoder = multiplications(model.autoencoder, lambda: model.autoencoder.decode(latents))
        if not network:
            # No layer can be counted: assume that each weight is used once at each position.
            positions = latents[0, 0].numel() * len(latents)
            network = max(1, sum(p.numel() for p in model.unet.parameters())) * positions
        return network, encoder, decoder
