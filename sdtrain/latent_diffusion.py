"""The whole model as one nn.Module without Lightning: autoencoder, conditioner, unet, objective."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sdtrain.adapters.interface import Adapter
from sdtrain.conditioning.channel_condition import ChannelCondition
from sdtrain.conditioning.interface import Conditioner, Conditioning, Inputs, MaskedPictures
from sdtrain.diffusion import Denoiser, Network, Objective
from sdtrain.errors import UserError
from sdtrain.models.hashes import part_hash
from sdtrain.models.modes import eval_mode
from sdtrain.types import Batch, Losses, Row


class LatentDiffusion(nn.Module):
    """A noise predictor on latents, with everything needed to train it and to sample with it.

    Its parts are `unet`, `conditioner` and `autoencoder`. A part whose attribute `frozen` is true
    is not trained, nor is an autoencoder without that attribute. A frozen part stays in eval mode,
    needs no gradient, and is neither in `trained_parameters` nor in `trained_state`.

    Args:
        unet: forward(x [B, C + K, h, w], timestep [B], context [B, L, D]) -> [B, C, h, w], with K =
            `condition_channels`.
        conditioner: Inputs -> Conditioning.
        channels: {name: channel condition}; their maps are concatenated to x_t in this order, after
            those of the conditioner.
        autoencoder: pictures to latents and back, see sdtrain.models.autoencoder.
        objective: latents, noise and u to losses.
        caption_dropout: share of samples trained without their condition, for classifier-free
            guidance.
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
        channels: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= caption_dropout <= 1:
            raise UserError(
                "must lie in [0, 1]", key="model.caption_dropout", value=caption_dropout
            )
        self.unet = unet
        self.conditioner: Conditioner = conditioner
        self.channels: Mapping[str, ChannelCondition] = nn.ModuleDict(channels or {})
        self.autoencoder = autoencoder
        self.objective = objective
        self.caption_dropout = caption_dropout
        self.adapted: frozenset[str] | None = None
        """The parts that an adapter trains some weights in; None without an adapter."""
        self._base_hashes: dict[str, str] = {}
        for part in self.frozen_parts().values():
            part.requires_grad_(False).eval()

    def attach(self, adapter: Adapter, frozen_dtype: torch.dtype | None = None) -> None:
        """Freeze all weights, and train those that an adapter puts beside them.

        Checkpoints then store the adapter's weights alone.

        frozen_dtype: of the UNet's own weights; None leaves them as they are.
        """
        for name in adapter.parts:
            self._base_hashes[name] = part_hash(getattr(self, name))
        self.requires_grad_(False)
        if frozen_dtype is not None:
            self.unet.to(frozen_dtype)
        self.adapted = adapter.parts
        for parameter in adapter.attach(self):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        self.train(self.training)

    # Trained and frozen parts

    def frozen_parts(self) -> dict[str, nn.Module]:
        """Return the frozen parts by name."""
        frozen = {}
        for name in self.PARTS:
            part = getattr(self, name)
            is_left_alone = self.adapted is not None and name not in self.adapted
            if is_left_alone or getattr(part, "frozen", name == "autoencoder"):
                frozen[name] = part
        return frozen

    def frozen_hashes(self) -> dict[str, str]:
        """Return {part: sha256 of its weights} of the frozen parts that have weights.

        Checkpoints do not store these weights. A part that was read from a file may have the hash
        of that file as its attribute `sha256`, which is then returned.
        """
        hashes = {}
        for name, part in self.frozen_parts().items():
            digest = part_hash(part)
            if digest:
                hashes[name] = digest
        return hashes | self._base_hashes

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Return every parameter that is trained, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def trained_state(self) -> dict[str, Tensor]:
        """Return what a checkpoint stores: parameters and persistent buffers of the trained parts,
        or of an adapter its parameters alone.
        """
        return self._state(frozen=False)

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """Load what `trained_state` returned. Raises RuntimeError if names or shapes differ."""
        self.load_state_dict(self._state(frozen=True) | state)

    def _state(self, *, frozen: bool) -> dict[str, Tensor]:
        """Return what `trained_state` leaves out, or what it holds."""
        if self.adapted is not None:
            trained = self.trained_parameters()
            whole = self.state_dict()
            return {name: value for name, value in whole.items() if (name in trained) != frozen}
        prefixes = tuple(f"{name}." for name in self.frozen_parts())
        state = {}
        for name, value in self.state_dict().items():
            if name.startswith(prefixes) == frozen:
                state[name] = value
        return state

    def add_tied_names(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return weights named as in `trained_parameters` under all names in `trained_state`.

        A tied parameter has one name in the former and several in the latter.
        """
        first_names = {parameter: name for name, parameter in self.named_parameters()}
        under_all_names = dict(weights)
        for name, parameter in self.named_parameters(remove_duplicate=False):
            first_name = first_names[parameter]
            if first_name in weights:
                under_all_names[name] = weights[first_name]
        return under_all_names

    def train(self, mode: bool = True) -> "LatentDiffusion":
        super().train(mode)
        frozen = self.frozen_parts().values()
        for part in frozen if self.adapted is None else self.children():
            part.eval()
        return self

    @property
    def device(self) -> torch.device:
        return next(self.parameters(), torch.zeros(())).device

    # Conditions

    @property
    def reads(self) -> frozenset[str]:
        """Which of "caption", "label", "depth" and "mask" the conditions read."""
        return self.conditioner.reads.union(*(each.reads for each in self.channels.values()))

    @property
    def condition_channels(self) -> int:
        """K: the number of input channels of the unet beside those of x_t."""
        return self.conditioner.channels + sum(each.channels for each in self.channels.values())

    def condition(self, inputs: Inputs) -> Conditioning:
        """Return what all conditions give the unet."""
        conditioning = self.conditioner(inputs)
        maps = [] if conditioning.channels is None else [conditioning.channels]
        none_dropped = torch.zeros_like(inputs.dropped)
        for name, condition in self.channels.items():
            maps.append(condition(inputs, inputs.channels_dropped.get(name, none_dropped)))
        channels = torch.cat(maps, dim=1) if maps else None
        return Conditioning(conditioning.context, channels)

    # From a batch to its losses

    def latents(
        self, image: Tensor | None, moments: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Return latents x0 [B, C, h, w] of about unit variance: the only place that makes them.

        image: [B, 3, H, W] in [-1, 1]; not used if there are moments. moments: [B, 2, C, h, w] of
        the autoencoder's posterior. noise: [B, C, h, w], the draw from the posterior; None takes
        its mean.
        """
        if moments is not None:
            return self.autoencoder.latents_of(moments, noise)
        return self.autoencoder.encode(image, noise)

    def latents_of_rows(self, rows: Sequence[Row]) -> Tensor:
        """Return latents x0 [N, C, h, w] of rows of a data set, from the posterior's mean."""
        with eval_mode(self.autoencoder):
            if rows[0].moments is not None:
                moments = torch.stack([row.moments for row in rows])
                return self.latents(None, moments.to(self.device))
            return self.latents(torch.stack([row.image for row in rows]).to(self.device))

    def inputs(self, batch: Batch) -> Inputs:
        """Return the inputs of the conditions for a training batch, a share of them dropped."""
        channels_dropped = {}
        for place, (name, condition) in enumerate(self.channels.items()):
            channels_dropped[name] = batch.channel_drop[:, place] < condition.dropout
        return Inputs(
            batch.caption,
            batch.label,
            batch.drop < self.caption_dropout,
            latent_size=tuple(batch.noise.shape[-2:]),
            depth=batch.depth,
            tokens=batch.tokens,
            context=batch.context,
            channels_dropped=channels_dropped,
            masked=self.masked_pictures(batch.image, batch.mask),
        )

    def masked_pictures(self, image: Tensor | None, mask: Tensor | None) -> MaskedPictures | None:
        """Return pictures to inpaint for the inputs of the conditions; None without a mask.

        image: [B, 3, H, W] in [-1, 1]. mask: [B, 1, H, W], 1 where it is drawn anew.
        """
        if mask is None:
            return None
        return MaskedPictures(image, mask, self.latents)

    def network(self, conditioning: Conditioning) -> Network:
        """Return (x, timestep) -> output: the only place that passes a conditioning to the unet."""

        def call(x: Tensor, timestep: Tensor) -> Tensor:
            if conditioning.channels is not None:
                x = torch.cat([x, conditioning.channels.to(x.dtype)], dim=1)
            return self.unet(x, timestep, conditioning.context)

        return call

    def losses(self, batch: Batch) -> Losses:
        """Return the training loss per sample, for the random draws in the batch."""
        x0 = self.latents(batch.image, batch.moments, batch.posterior)
        network = self.network(self.condition(self.inputs(batch)))
        losses = self.objective(network, x0, batch.noise, batch.u, batch.input_noise)
        if batch.loss_weight is None:
            return losses
        return replace(losses, per_sample=losses.per_sample * batch.loss_weight)

    @torch.no_grad()
    def epsilon_error(self, x0: Tensor, inputs: Inputs, noise: Tensor, log_snr: Tensor) -> Tensor:
        """Return the mean squared error of epsilon [B] at log_snr [B] in the schedule's range."""
        network = self.network(self.condition(inputs))
        t = self.objective.schedule.time_of(log_snr)
        return self.objective.epsilon_error(network, x0, noise, t)

    def denoiser(self, conditioning: Conditioning) -> Denoiser:
        """Return the denoiser that samplers call, for this conditioning."""
        objective = self.objective
        return Denoiser(self.network(conditioning), objective.schedule, objective.prediction)
