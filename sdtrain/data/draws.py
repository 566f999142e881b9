"""Collating rows to a Batch with every random number of its training step, keyed by ordinal."""

import functools
from collections.abc import Callable

import numpy as np
import torch

from sdtrain.data.order import permute
from sdtrain.randomness import KeyedRandom
from sdtrain.types import Batch, Row


class Collate:
    """Rows and their ordinals to a Batch. Runs in the loader's workers.

    Args:
        seed: of the run.
        latent_shape: (C, h, w) of the noise.
        posterior: whether draws for the autoencoder's posterior are needed.
        stratified: spread the u of one global batch evenly: u = (pi(place in the batch) + jitter) / global_batch, with pi keyed by
            the optimizer step. Each u is still uniform by itself.
        global_batch: pictures of one optimizer step, over all ranks and micro-batches.
        noise: (draw, shape) -> (noise, what is added to the latents where that is something else or None), see sdtrain.diffusion.noise.
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
        self.law, self.latent_shape, self.stratified, self.global_batch, self.seed = (
            noise,
            tuple(latent_shape),
            stratified,
            global_batch,
            seed,
        )
        self.noise, self.scalars = KeyedRandom(seed, "noise"), KeyedRandom(seed, "scalars")
        self.posterior = KeyedRandom(seed, "posterior") if posterior else None

    def u(self, ordinal: int, jitter: float) -> float:
        if not self.stratified:
            return jitter
        step, place = divmod(ordinal, self.global_batch)
        stratum = permute(
            place, self.global_batch, self.seed, -1 - step
        )  # epochs of the order count from 0: no key is shared
        return min((stratum + jitter) / self.global_batch, np.nextafter(1.0, 0.0))

    def __call__(self, rows: list[Row], ordinals: list[int], stream_end: int) -> Batch:
        scalars = [
            self.scalars.uniform(o, 2) for o in ordinals
        ]  # one row of uniforms a sample: time, caption drop
        stack = lambda arrays: torch.from_numpy(np.stack(arrays))  # noqa: E731
        drawn = [
            self.law(functools.partial(self.noise.normal, o), self.latent_shape) for o in ordinals
        ]
        posterior = (
            None
            if self.posterior is None
            else stack([self.posterior.normal(o, self.latent_shape) for o in ordinals])
        )
        return Batch(
            image=torch.stack([row.image for row in rows]),
            caption=[row.caption for row in rows],
            label=torch.tensor([row.label for row in rows]),
            depth=None if rows[0].depth is None else torch.stack([row.depth for row in rows]),
            noise=stack([noise for noise, _ in drawn]),
            input_noise=None if drawn[0][1] is None else stack([added for _, added in drawn]),
            posterior=posterior,
            u=torch.tensor(
                [self.u(o, s[0]) for o, s in zip(ordinals, scalars, strict=True)],
                dtype=torch.float64,
            ),
            drop=torch.tensor([s[1] for s in scalars], dtype=torch.float64),
            ordinal=torch.tensor(ordinals),
            stream_end=stream_end,
            skipped=tuple(bad for row in rows for bad in row.skipped),
        )
