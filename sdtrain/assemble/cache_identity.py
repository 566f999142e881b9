"""What cached latents and contexts depend on, beside the picture or the caption."""

from typing import Any

from torch import nn

from sdtrain.assemble.kept_files import SHA256, file_hashes, kept_files
from sdtrain.config.path_keys import is_path
from sdtrain.models.hashes import part_hash

OTHER_KEYS = frozenset({"sha256", SHA256, "variant"})
"""Keys of any part that say which files it reads: the hash of its weights says more."""

AFTER_MOMENTS = frozenset(
    {"latent_scale", "latent_shift", "sample_posterior", "latent_channels", "downsampling"}
)
"""Keys of an autoencoder that do not change the moments of a picture."""


def cache_identity(cfg: dict, part: str, module: nn.Module) -> dict[str, Any]:
    """Return everything that the results of a frozen part depend on: {name: plain value}.

    These are its weights, the files that it reads, and its arguments. part: "autoencoder" or
    "conditioner". module: that part.
    """
    node = cfg["model"][part]
    files = getattr(module, SHA256, None) or file_hashes(cfg).get(part)
    ignored = {*OTHER_KEYS, *(kept.argument for kept in kept_files(cfg) if kept.part == part)}
    if part == "autoencoder":
        ignored |= AFTER_MOMENTS
    arguments = {}
    for key, value in node.items():
        if key not in ignored and not is_path(f"model.{part}.{key}"):
            arguments[key] = value
    return {part: part_hash(module), "files": files} | arguments
