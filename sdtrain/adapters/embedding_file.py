"""Files of learned embeddings, as diffusers and the common user interfaces read and write them."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdtrain.errors import UserError
from sdtrain.files import atomic_file

EMBEDDING = "learned_embeds.safetensors"
"""Name of the file of a learned word, as diffusers has it."""

OTHER_NAME = "emb_params"
"""The name of the vectors in files of other programs, which are called by the name of the file."""


def write_embedding(path: Path, word: str, vectors: Tensor) -> None:
    """Write the vectors [n, D] of a word, by its name. Raises OSError.

    `load_textual_inversion` of diffusers reads the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        save_file({word: vectors.detach().cpu().contiguous()}, temporary)


def read_embedding(path: str, key: str) -> tuple[str, Tensor]:
    """Return (word, vectors [n, D] float32) of a file, or of EMBEDDING in a folder.

    The word is the name of the tensor, or that of the file if the tensor is called `emb_params`.
    Raises UserError, which names the key, for a file that holds anything else.
    """
    file = Path(path)
    if file.is_dir():
        file = file / EMBEDDING
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise _error(path, key, f"cannot be read as safetensors: {reason}") from error
    if OTHER_NAME in tensors:
        tensors = {file.stem: tensors[OTHER_NAME]}
    if len(tensors) != 1:
        raise _error(path, key, f"holds {len(tensors)} tensors, and must hold that of one word")
    ((word, vectors),) = tensors.items()
    if vectors.ndim == 1:
        vectors = vectors[None]
    if vectors.ndim != 2 or not len(vectors) or not bool(torch.isfinite(vectors).all()):
        raise _error(path, key, f"holds a tensor {tuple(vectors.shape)}, which is no embedding")
    return word, vectors.float()


def _error(path: str, key: str, problem: str) -> UserError:
    return UserError(
        problem,
        key=key,
        value=path,
        remedy=f"Set {key} to a file of sdtrain-export format=embedding, of diffusers, or of "
        "another program that writes safetensors.",
    )
