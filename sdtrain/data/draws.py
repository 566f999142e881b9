"""Collating rows to a Batch with every random number of its training step, keyed by ordinal."""

import functools
from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from sdtrain.data.order import permute
from sdtrain.randomness import KeyedRandom
from sdtrain.types import Batch, Row


class Collate:
    """Rows and their ordinals to a Batch. Runs in the loader's workers.

    Args:
        seed: of the run.
        latent_shape: (C, h, w) of the noise.
        posterior: whether draws for the autoencoder's posterior are needed.
        stratified: spread the u of one global batch evenly: u = (pi(place in the batch) + jitter) /
            global_batch, with pi keyed by the optimizer step. Each u is still uniform by itself.
        global_batch: pictures of one optimizer step, over all ranks and micro-batches.
        noise: (draw, shape) -> (noise, what is added to the latents where that is something else or
            None), see sdtrain.diffusion.noise.
    """

    def __init__(
        self,
        *,
        seed: int,
        latent_shape: tuple[int, int, int],
        posterior: bool,
        stratified: bool,
        global_batch: int,
        noise: Callable,
    ) -> None:
        self.seed = seed
        self.latent_shape = tuple(latent_shape)
        self.stratified = stratified
        self.global_batch = global_batch
        self.law = noise
        self.noise = KeyedRandom(seed, "noise")
        self.scalars = KeyedRandom(seed, "scalars")
        self.posterior = KeyedRandom(seed, "posterior") if posterior else None
        self.network = KeyedRandom(seed, "network")

    def u(self, ordinal: int, jitter: float) -> float:
        """The uniform behind t of one sample; jitter: its own draw in [0, 1)."""
        if not self.stratified:
            return jitter
        step, place = divmod(ordinal, self.global_batch)
        # Below 0, where the epochs of the order do not reach: no key is shared.
        stratum = permute(place, self.global_batch, self.seed, -1 - step)
        return min((stratum + jitter) / self.global_batch, np.nextafter(1.0, 0.0))

    def __call__(self, rows: list[Row], ordinals: list[int], stream_end: int) -> Batch:
        # One row of uniforms a sample: time, caption drop.
        scalars = [self.scalars.uniform(ordinal, 2) for ordinal in ordinals]
        u = [self.u(ordinal, time) for ordinal, (time, _) in zip(ordinals, scalars, strict=True)]
        noise, input_noise = self._noise(ordinals)
        return Batch(
            image=_stacked([row.image for row in rows]),
            caption=[row.caption for row in rows],
            label=torch.tensor([row.label for row in rows]),
            depth=_stacked([row.depth for row in rows]),
            noise=noise,
            input_noise=input_noise,
            posterior=self._posterior_draws(ordinals),
            u=torch.tensor(u, dtype=torch.float64),
            drop=torch.tensor([drop for _, drop in scalars], dtype=torch.float64),
            ordinal=torch.tensor(ordinals),
            stream_end=stream_end,
            # Of the first picture: no other micro-batch, of this or another rank, begins with it.
            network_seed=int(self.network.at(ordinals[0]).integers(1 << 63)),
            moments=_stacked([row.moments for row in rows]),
            skipped=tuple(chain.from_iterable(row.skipped for row in rows)),
        )

    def _noise(self, ordinals: list[int]) -> tuple[Tensor, Tensor | None]:
        """[B, C, h, w] each: what is to be predicted, and what is added where that differs."""
        noise = []
        added = []
        for ordinal in ordinals:
            draw = functools.partial(self.noise.normal, ordinal)
            predicted, other = self.law(draw, self.latent_shape)
            noise.append(torch.from_numpy(predicted))
            added.append(None if other is None else torch.from_numpy(other))
        return torch.stack(noise), _stacked(added)

    def _posterior_draws(self, ordinals: list[int]) -> Tensor | None:
        if self.posterior is None:
            return None
        draws = [self.posterior.normal(ordinal, self.latent_shape) for ordinal in ordinals]
        return torch.from_numpy(np.stack(draws))


def _stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
    """One tensor of what every row has; None where the first has nothing."""
    return None if parts[0] is None else torch.stack(list(parts))
