"""Is the picture that was asked for the nearest of all?"""

import torch
from torch import Tensor


def nearest_picture_share(drawn: Tensor, pictures: Tensor, wanted: Tensor) -> dict[str, float]:
    """drawn [M, ...] latents of samples, pictures [N, ...] latents of all pictures, wanted [M] the index each sample should be nearest to.

    top_1: share of samples whose nearest picture (Euclidean) is the wanted one; top_5: whose five nearest hold it.
    """
    distance = torch.cdist(drawn.flatten(1), pictures.flatten(1))
    nearer = (distance < distance.gather(1, wanted[:, None])).sum(1)
    return {
        "top_1": (nearer < 1).double().mean().item(),
        "top_5": (nearer < 5).double().mean().item(),
    }
