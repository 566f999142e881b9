"""What a run adds to its configuration once the model is built."""

import inspect
from typing import Any

from sdtrain.assemble.kept_files import SHA256, file_hashes
from sdtrain.conditioning.interface import Conditioner
from sdtrain.latent_diffusion import LatentDiffusion


def recorded(cfg: dict, model: LatentDiffusion) -> dict[str, dict[str, Any]]:
    """{part: keys}: the hashes of what it reads and does not store, what sampling has to know of
    the classes, and whether the latents are shifted, where they can be.
    """
    added: dict[str, dict[str, Any]] = {part: {} for part in LatentDiffusion.PARTS}
    for part, digest in model.frozen_hashes().items():
        added[part]["sha256"] = digest
    for part, digest in file_hashes(cfg).items():
        added[part][SHA256] = digest
    autoencoder = model.autoencoder
    if hasattr(autoencoder, SHA256):
        added["autoencoder"][SHA256] = autoencoder.files_sha256
    if getattr(autoencoder, "has_latent_shift", False):
        added["autoencoder"]["latent_shift"] = autoencoder.latent_shift
    if "label" in model.conditioner.reads:
        added["conditioner"] |= _classes_of(model.conditioner)
    return added


def _classes_of(conditioner: Conditioner) -> dict[str, Any]:
    """What sampling has to know of the classes, as far as its constructor takes it."""
    known = {
        "num_classes": conditioner.num_classes,
        "class_names": list(conditioner.class_names) or None,
    }
    taken = inspect.signature(type(conditioner)).parameters
    return {key: value for key, value in known.items() if value is not None and key in taken}
