"""The pictures that are drawn during training: seeds, and the conditions that the model reads."""

from collections.abc import Sequence
from dataclasses import replace

from sdtrain.generation.drawing import Request
from sdtrain.types import PictureData, Pictures


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

    Depth maps are those of held-out pictures, whose captions then replace the example prompts of
    the data set.

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
        requests.append(request)
    return requests
