"""Collate rows to a Batch with all random numbers of its training step, keyed by ordinal."""

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from sdtrain.data.masks import random_mask
from sdtrain.data.order import permute
from sdtrain.randomness import KeyedRandom
from sdtrain.types import Batch, Row


class Collate:
    """Makes a Batch of rows and their ordinals, in the workers of the data loader.

    Args:
        seed: of the run.
        latent_shape: (C, h, w) of the noise of a square picture.
        posterior: whether normal draws for sampling the autoencoder's posterior are needed.
        stratified: spread the u of one global batch evenly: u = (pi(place in the batch) + jitter) /
            global_batch, with a permutation pi keyed by the optimizer step. Each u by itself is
            still uniform.
        global_batch: pictures of one optimizer step, over all ranks and micro-batches.
        noise: (draw, shape) -> (noise to predict, noise to add to the latents or None if it is the
            same), see sdtrain.diffusion.noise.
        tokenize: B captions -> tokens [B, L], see sdtrain.conditioning.interface; or None.
        caption_dropout: share of captions that are replaced by the empty one before that.
        latent_shapes: {(height, width) of a picture: (C, h, w) of its noise}, of pictures that are
            no squares; by default there are none.
        empty_context: [L, D], the context of the empty caption, if rows bring contexts; or None.
        channels: names of the model's channel conditions, in its order.
        masks: whether a mask is drawn for each picture, see sdtrain.data.masks.
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
        tokenize: Callable[[Sequence[str]], Tensor] | None = None,
        caption_dropout: float = 0.0,
        latent_shapes: Mapping[tuple[int, int], tuple[int, int, int]] | None = None,
        empty_context: Tensor | None = None,
        channels: Sequence[str] = (),
        masks: bool = False,
    ) -> None:
        self.seed = seed
        self.latent_shape = tuple(latent_shape)
        self.latent_shapes = dict(latent_shapes or {})
        self.stratified = stratified
        self.global_batch = global_batch
        self.draw_noise = noise
        self.tokenize = tokenize
        self.caption_dropout = caption_dropout
        self.empty_context = empty_context
        self.noise = KeyedRandom(seed, "noise")
        self.scalars = KeyedRandom(seed, "scalars")
        self.posterior = KeyedRandom(seed, "posterior") if posterior else None
        self.network = KeyedRandom(seed, "network")
        self.mask = KeyedRandom(seed, "mask") if masks else None
        # One key for each, so that a condition is dropped alike whatever stands beside it.
        self.channel_drop = [KeyedRandom(seed, f"drop.{name}") for name in channels]

    def u(self, ordinal: int, jitter: float) -> float:
        """Return the number in [0, 1) from which the distribution of times makes t of one sample.

        ordinal: of the sample, counted from the start of training. jitter: uniform in [0, 1), drawn
        for this sample.
        """
        if not self.stratified:
            return jitter
        step, place = divmod(ordinal, self.global_batch)
        # Negative, so that no key is shared with the epochs of the picture order, which begin at 0.
        stratum = permute(place, self.global_batch, self.seed, -1 - step)
        return min((stratum + jitter) / self.global_batch, np.nextafter(1.0, 0.0))

    def shape_of(self, row: Row) -> tuple[int, int, int]:
        """Return (C, h, w) of the latents of a row. All rows of a batch have the same."""
        if row.moments is not None:
            return tuple(row.moments.shape[1:])
        return self.latent_shapes.get(tuple(row.image.shape[1:]), self.latent_shape)

    def __call__(self, rows: list[Row], ordinals: list[int], stream_end: int) -> Batch:
        u = []
        drop = []
        for ordinal in ordinals:
            jitter, uniform = self.scalars.uniform(ordinal, 2)
            u.append(self.u(ordinal, jitter))
            drop.append(uniform)
        images = []
        captions = []
        labels = []
        depths = []
        moments = []
        skipped = []
        for row in rows:
            images.append(row.image)
            captions.append(row.caption)
            labels.append(row.label)
            depths.append(row.depth)
            moments.append(row.moments)
            skipped += row.skipped
        shape = self.shape_of(rows[0])
        noise, input_noise = self._noise(ordinals, shape)
        return Batch(
            image=_stack(images),
            caption=captions,
            label=torch.tensor(labels),
            depth=_stack(depths),
            noise=noise,
            input_noise=input_noise,
            posterior=self._posterior_draws(ordinals, shape),
            u=torch.tensor(u, dtype=torch.float64),
            drop=torch.tensor(drop, dtype=torch.float64),
            ordinal=torch.tensor(ordinals),
            stream_end=stream_end,
            # Keyed by the first ordinal, with which no other micro-batch of any rank begins.
            network_seed=int(self.network.at(ordinals[0]).integers(1 << 63)),
            moments=_stack(moments),
            tokens=self._tokens(captions, drop),
            context=self._contexts(rows, drop),
            mask=self._masks(rows, ordinals),
            channel_drop=self._channel_drop(ordinals),
            loss_weight=_loss_weights(rows),
            skipped=tuple(skipped),
        )

    def _tokens(self, captions: list[str], drop: list[float]) -> Tensor | None:
        """Return the tokens of captions, some of which are dropped by their uniforms."""
        if self.tokenize is None or self.empty_context is not None:
            return None
        kept = []
        for caption, uniform in zip(captions, drop, strict=True):
            kept.append("" if uniform < self.caption_dropout else caption)
        return self.tokenize(kept)

    def _contexts(self, rows: list[Row], drop: list[float]) -> Tensor | None:
        """Return the contexts of captions, some of which are dropped by their uniforms."""
        if rows[0].context is None:
            return None
        kept = []
        for row, uniform in zip(rows, drop, strict=True):
            kept.append(self.empty_context if uniform < self.caption_dropout else row.context)
        return torch.stack(kept)

    def _masks(self, rows: list[Row], ordinals: list[int]) -> Tensor | None:
        """Return masks [B, 1, H, W] of the pictures' size, or None if none are needed."""
        if self.mask is None:
            return None
        masks = []
        for row, ordinal in zip(rows, ordinals, strict=True):
            masks.append(random_mask(self.mask.at(ordinal), *row.image.shape[1:]))
        return torch.from_numpy(np.stack(masks)[:, None]).float()

    def _channel_drop(self, ordinals: list[int]) -> Tensor | None:
        """Return [B, N] uniforms, one for each channel condition; None for N = 0."""
        if not self.channel_drop:
            return None
        uniforms = []
        for ordinal in ordinals:
            uniforms.append([random.uniform(ordinal, 1)[0] for random in self.channel_drop])
        return torch.tensor(uniforms, dtype=torch.float64)

    def _noise(
        self, ordinals: list[int], shape: tuple[int, int, int]
    ) -> tuple[Tensor, Tensor | None]:
        """Return the noise to predict, and the noise to add or None if it is the same.

        Both are [B, C, h, w]; shape: (C, h, w).
        """
        noise = []
        input_noise = []
        for ordinal in ordinals:
            draw = functools.partial(self.noise.normal, ordinal)
            predicted, added = self.draw_noise(draw, shape)
            noise.append(torch.from_numpy(predicted))
            input_noise.append(None if added is None else torch.from_numpy(added))
        return torch.stack(noise), _stack(input_noise)

    def _posterior_draws(self, ordinals: list[int], shape: tuple[int, int, int]) -> Tensor | None:
        if self.posterior is None:
            return None
        draws = [self.posterior.normal(ordinal, shape) for ordinal in ordinals]
        return torch.from_numpy(np.stack(draws))


def _loss_weights(rows: list[Row]) -> Tensor | None:
    """Return the weights [B] of the losses; None if all are 1."""
    weights = [row.loss_weight for row in rows]
    return None if set(weights) == {1.0} else torch.tensor(weights)


def _stack(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """Stack the tensors of all rows; None if the first row has none."""
    return None if tensors[0] is None else torch.stack(list(tensors))
