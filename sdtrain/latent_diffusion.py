"""The model as one module without Lightning: autoencoder, conditioner, unet and objective."""

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from sdtrain.conditioning.interface import Conditioner, Conditioning, Inputs
from sdtrain.diffusion import Denoiser, Network, Objective
from sdtrain.errors import UserError
from sdtrain.models.modes import eval_mode
from sdtrain.types import Batch, Losses, Row


def weights_hash(part: nn.Module) -> str | None:
    """sha256 of names, shapes, types and bits of a part's parameters and persistent buffers; None
    where it has none.
    """
    state = part.state_dict()
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        # As bytes: numpy does not know all types.
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest() if state else None


class LatentDiffusion(nn.Module):
    """A noise predictor on latents, with what it takes to train it and to draw with it.

    Its parts are `unet`, `conditioner` and `autoencoder`. A part with a true attribute `frozen` is
    not trained, nor is an autoencoder without that attribute: it stays in eval mode, needs no
    gradient, and is neither in `trained_parameters` nor in `trained_state`.

    Args:
        unet: forward(x [B, C + K, h, w], timestep [B], context [B, L, D]) -> [B, C, h, w], with K =
            conditioner.channels.
        conditioner: Inputs -> Conditioning.
        autoencoder: pictures to latents and back, see sdtrain.models.autoencoder.
        objective: latents, noise and u to losses.
        caption_dropout: share of samples that are trained without their condition, for
            classifier-free guidance.
    """

    PARTS = ("unet", "conditioner", "autoencoder")

    def __init__(
        self,
        *,
        unet: nn.Module,
        conditioner: nn.Module,
        autoencoder: nn.Module,
        objective: Objective,
        caption_dropout: float,
    ) -> None:
        super().__init__()
        if not 0 <= caption_dropout <= 1:
            raise UserError(
                "must lie in [0, 1]", key="model.caption_dropout", value=caption_dropout
            )
        self.unet = unet
        self.conditioner: Conditioner = conditioner
        self.autoencoder = autoencoder
        self.objective = objective
        self.caption_dropout = caption_dropout
        for part in self.frozen_parts().values():
            part.requires_grad_(False).eval()

    # Trained and frozen parts

    def frozen_parts(self) -> dict[str, nn.Module]:
        found = {}
        for name in self.PARTS:
            part = getattr(self, name)
            if getattr(part, "frozen", name == "autoencoder"):
                found[name] = part
        return found

    def frozen_hashes(self) -> dict[str, str]:
        """{part: sha256 of its weights}, of the frozen parts that have any: no checkpoint holds
        them. One that was read from a file may have its hash as `sha256`.
        """
        found = {}
        for name, part in self.frozen_parts().items():
            digest = getattr(part, "sha256", None) or weights_hash(part)
            if digest:
                found[name] = digest
        return found

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter that training moves, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def trained_state(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers of the trained parts: what a checkpoint holds."""
        frozen = self._prefixes(self.frozen_parts())
        return {name: v for name, v in self.state_dict().items() if not name.startswith(frozen)}

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `trained_state`. Raises RuntimeError where names or shapes differ."""
        frozen = self._prefixes(self.frozen_parts())
        kept = {name: v for name, v in self.state_dict().items() if name.startswith(frozen)}
        self.load_state_dict(kept | state)

    def under_all_names(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights that are named as in `trained_parameters`, for `load_trained_state`: a tied
        parameter has one name there, and several in the state.
        """
        first_names = {parameter: name for name, parameter in self.named_parameters()}
        found = dict(weights)
        for name, parameter in self.named_parameters(remove_duplicate=False):
            first_name = first_names[parameter]
            if first_name in weights:
                found[name] = weights[first_name]
        return found

    @staticmethod
    def _prefixes(parts: Iterable[str]) -> tuple[str, ...]:
        return tuple(f"{name}." for name in parts)

    def train(self, mode: bool = True) -> "LatentDiffusion":
        super().train(mode)
        for part in self.frozen_parts().values():
            part.eval()
        return self

    @property
    def device(self) -> torch.device:
        return next(self.parameters(), torch.zeros(())).device

    # From a batch to its losses

    def latents(
        self, image: Tensor | None, moments: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """x0 [B, C, h, w] of about unit variance: the one place where pictures become latents.

        image [B, 3, H, W] in [-1, 1]; where there are moments [B, 2, C, h, w] of the posterior, the
        autoencoder is not asked. noise [B, C, h, w]: the draw from the posterior, None takes its
        mean.
        """
        if moments is not None:
            return self.autoencoder.latents_of(moments, noise)
        return self.autoencoder.encode(image, noise)

    def latents_of_rows(self, rows: Sequence[Row]) -> Tensor:
        """x0 [N, C, h, w] of rows as a data set gives them, of the posterior's mean."""
        with eval_mode(self.autoencoder):
            if rows[0].moments is not None:
                moments = torch.stack([row.moments for row in rows])
                return self.latents(None, moments.to(self.device))
            return self.latents(torch.stack([row.image for row in rows]).to(self.device))

    def inputs(self, batch: Batch, dropped: Tensor) -> Inputs:
        """What the condition of a batch is made of; dropped [B] bool."""
        size = tuple(batch.noise.shape[-2:])
        return Inputs(batch.caption, batch.label, dropped, latent_size=size, depth=batch.depth)

    def network(self, conditioning: Conditioning) -> Network:
        """(x, timestep) -> output: the one place where a conditioning reaches the unet."""

        def call(x: Tensor, timestep: Tensor) -> Tensor:
            if conditioning.channels is not None:
                x = torch.cat([x, conditioning.channels.to(x.dtype)], dim=1)
            return self.unet(x, timestep, conditioning.context)

        return call

    def losses(self, batch: Batch) -> Losses:
        """The training loss per sample, at the batch's own draws."""
        x0 = self.latents(batch.image, batch.moments, batch.posterior)
        conditioning = self.conditioner(self.inputs(batch, batch.drop < self.caption_dropout))
        network = self.network(conditioning)
        return self.objective(network, x0, batch.noise, batch.u, batch.input_noise)

    @torch.no_grad()
    def epsilon_error(self, x0: Tensor, inputs: Inputs, noise: Tensor, log_snr: Tensor) -> Tensor:
        """Mean squared error of epsilon [B] at levels log_snr [B] inside the schedule's range."""
        network = self.network(self.conditioner(inputs))
        t = self.objective.schedule.time_of(log_snr)
        return self.objective.epsilon_error(network, x0, noise, t)

    def denoiser(self, conditioning: Conditioning) -> Denoiser:
        """What a sampler sees of the model."""
        objective = self.objective
        return Denoiser(self.network(conditioning), objective.schedule, objective.prediction)
