"""The pictures that are drawn during training: seeds, and the conditions that the model reads."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from sdtrain.data.masks import random_mask
from sdtrain.generation.drawing import Request, StartPicture
from sdtrain.randomness import KeyedRandom
from sdtrain.types import PictureData, Pictures, Row


def grid_requests(
    reads: frozenset[str],
    data: PictureData,
    held_out: Pictures,
    *,
    prompts: Sequence[str] | None,
    count: int,
    seed: int,
) -> list[Request]:
    """Return `count` requests with the conditions that a model reads.

    Depth maps are those of held-out pictures, and these are what is inpainted. Their captions then
    replace the example prompts of the data set.

    Args:
        reads: what the model reads.
        data: its data set.
        held_out: pictures that it is not trained on.
        prompts: repeated if there are fewer; None takes captions of the data.
        count: of requests.
        seed: of the first one; each further one adds 1.
    """
    texts = prompts or data.example_prompts(count)
    requests = []
    for i in range(count):
        request = Request(seed + i)
        if "caption" in reads:
            request = replace(request, prompt=texts[i % len(texts)])
        if "label" in reads:
            request = replace(request, label=i * data.num_classes // count)
        if "depth" in reads:
            index = i % len(held_out)
            row = held_out[(index, index)]
            request = replace(request, depth=row.depth)
            if request.prompt and not prompts:
                request = replace(request, prompt=row.caption)
        if "mask" in reads:
            row = held_out[(i % len(held_out), i % len(held_out))]
            request = replace(request, start=_masked(row, seed + i))
            if request.prompt and not prompts:
                request = replace(request, prompt=row.caption)
        requests.append(request)
    return requests


def _masked(row: Row, seed: int) -> StartPicture:
    """Return a held-out picture with a random mask."""
    draw = KeyedRandom(seed, "samples.mask").at(0)
    height, width = row.image.shape[1:]
    mask = torch.from_numpy(random_mask(draw, height, width))
    return StartPicture(Path("held-out"), (width, height), row.image, mask[None])
