"""Files of learned embeddings, as diffusers and the common user interfaces read and write them."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdtrain.errors import UserError, first_line
from sdtrain.files import atomic_file

EMBEDDING = "learned_embeds.safetensors"
"""Name of the file of a learned word, as diffusers has it."""

PICKLES = (".pt", ".bin")
"""Suffixes of the files of programs that write no safetensors."""

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
        tensors = _read_pickle(file) if file.suffix in PICKLES else load_file(file)
    except (OSError, SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        kind = "tensors alone" if file.suffix in PICKLES else "safetensors"
        raise _error(path, key, f"cannot be read as {kind}: {reason}") from error
    if OTHER_NAME in tensors:
        tensors = {file.stem: tensors[OTHER_NAME]}
    if len(tensors) != 1:
        raise _error(path, key, f"holds {len(tensors)} tensors, and must hold that of one word")
    ((word, vectors),) = tensors.items()
    if not isinstance(vectors, Tensor) or not word.strip():
        raise _error(path, key, f"holds a {type(vectors).__name__} called {word!r}")
    if vectors.ndim == 1:
        vectors = vectors[None]
    if vectors.ndim != 2 or not len(vectors) or not bool(torch.isfinite(vectors).all()):
        raise _error(path, key, f"holds a tensor {tuple(vectors.shape)}, which is no embedding")
    return word, vectors.float()


def _read_pickle(file: Path) -> dict[str, Any]:
    """Read tensors from a pickle, of which nothing else is executed.

    An entry `string_to_param` with the tensors is that of Stable Diffusion web UIs.
    """
    content = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        raise RuntimeError(f"a {type(content).__name__} in place of named tensors")
    if "string_to_param" in content:
        return {OTHER_NAME: next(iter(content["string_to_param"].values()), None)}
    return content


def _error(path: str, key: str, problem: str) -> UserError:
    return UserError(
        problem,
        key=key,
        value=path,
        remedy=f"Set {key} to a file of sdtrain-export format=embedding, of diffusers, or of "
        "another program.",
    )
