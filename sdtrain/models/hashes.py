"""Hashes of the weights of a part of the model."""

import hashlib

import torch
from torch import nn


def weights_hash(part: nn.Module) -> str | None:
    """Return the SHA-256 of the names, shapes, dtypes and bytes of a part's parameters and
    persistent buffers, or None if it has neither.
    """
    state = part.state_dict()
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        # As bytes, because numpy lacks some of the types.
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest() if state else None


def part_hash(part: nn.Module) -> str | None:
    """Return the hash of a frozen part: its attribute `sha256`, that of the file it was read from,
    or else `weights_hash`.
    """
    return getattr(part, "sha256", None) or weights_hash(part)
