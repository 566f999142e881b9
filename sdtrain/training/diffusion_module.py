"""Trains a noise predictor: LatentDiffusion under Lightning. No formula stands here."""

import torch
from torch import Tensor, nn

from sdtrain.latent_diffusion import LatentDiffusion
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

    def frozen_hashes(self) -> dict[str, str]:
        return self.model.frozen_hashes()

    def state_dict(self) -> dict[str, Tensor]:
        return self.model.trained_state()

    def load_state_dict(self, state_dict: dict[str, Tensor], strict: bool = True) -> None:
        self.model.load_trained_state(state_dict)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        losses = self.model.losses(batch)
        return self.note_losses(batch, losses.per_sample, losses.t)

    @torch.no_grad()
    def validate(self, batch: Batch) -> dict[str, Tensor]:
        """Per sample [B]: the training loss at the batch's own draws, captions dropped as in
        training.
        """
        return {"loss": self.model.losses(batch).per_sample}
