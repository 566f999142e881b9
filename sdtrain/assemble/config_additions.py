"""Keys that a run adds to its configuration once the model is built."""

import inspect
from typing import Any

from sdtrain.assemble.kept_files import SHA256, file_hashes
from sdtrain.conditioning.interface import Conditioner
from sdtrain.latent_diffusion import LatentDiffusion


def config_additions(cfg: dict, model: LatentDiffusion) -> dict[str, dict[str, Any]]:
    """Return {part of the model: keys to add to its node}.

    These are the hashes of the files and weights that checkpoints do not store, the classes for
    sampling, and whether the latents are shifted if the autoencoder has a shift.
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
        added["conditioner"] |= _class_arguments(model.conditioner)
    return added


def _class_arguments(conditioner: Conditioner) -> dict[str, Any]:
    """Return the class arguments that sampling needs and that the constructor accepts."""
    arguments = {
        "num_classes": conditioner.num_classes,
        "class_names": list(conditioner.class_names) or None,
    }
    parameters = inspect.signature(type(conditioner)).parameters
    accepted = {}
    for name, value in arguments.items():
        if value is not None and name in parameters:
            accepted[name] = value
    return accepted
