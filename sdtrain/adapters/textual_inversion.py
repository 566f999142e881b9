"""New words of which only the embedding is trained (Gal et al. 2023, "An Image is Worth One Word").

The text encoder and the UNet stay as they are: a new word stands for one vector or several, which
take the place of token embeddings.
"""

import re
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from sdtrain.adapters.interface import Adapter
from sdtrain.conditioning.interface import Conditioner
from sdtrain.conditioning.new_words import NewWord
from sdtrain.errors import UserError

BEGIN_AND_END = 2
"""Tokens of a caption that mark its begin and end."""


class ExtendedEmbedding(nn.Module):
    """Token embeddings with rows behind those of a frozen table.

    Args:
        base: the frozen table of N rows, which may be extended itself.
        rows: [M, D], the initial values of the rows N to N + M - 1, which are trained.
    """

    def __init__(self, base: "nn.Embedding | ExtendedEmbedding", rows: Tensor) -> None:
        super().__init__()
        self.num_embeddings = base.num_embeddings + len(rows)
        self.embedding_dim = base.embedding_dim
        self.base = base.requires_grad_(False)
        self.rows = nn.Parameter(rows.float().clone())

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the embeddings [..., D] of tokens [...] in [0, N + M)."""
        count = self.base.num_embeddings
        known = self.base(tokens.clamp(max=count - 1))
        new = self.rows[(tokens - count).clamp(min=0)].to(known.dtype)
        return torch.where((tokens >= count)[..., None], new, known)


class TextualInversion(Adapter):
    """Learns the vectors of a new word.

    Args:
        word: the new word, as it is written in captions.
        initial: a word of a single token, with whose embedding the vectors begin.
        vectors: how many tokens the word stands for.

    Raises UserError for a number of vectors below 1.
    """

    parts: ClassVar[frozenset[str]] = frozenset({"conditioner"})

    def __init__(self, *, word: str, initial: str, vectors: int = 1) -> None:
        if vectors < 1:
            raise UserError("must be at least 1", key="adapter.vectors", value=vectors)
        if not word or re.search(r"\s", word):
            raise UserError(
                "must be a word without blanks, such as <cat>", key="adapter.word", value=word
            )
        if word != word.lower():
            raise UserError(
                "must be in lower case, as the tokenizer reads all captions",
                key="adapter.word",
                value=word,
            )
        self.new_word = NewWord(word, initial, vectors)

    def attach(self, model: Any) -> list[nn.Parameter]:
        """Let the model's text encoder know the word.

        Raises UserError for a model without a CLIP text encoder, and as `add_word` does.
        """
        conditioner = model.conditioner
        check_can_learn_words(conditioner, "adapter", "textual_inversion")
        most = conditioner.max_tokens - BEGIN_AND_END
        if self.new_word.vectors > most:
            raise UserError(
                f"is more than the {most} tokens of a caption that the text encoder reads",
                key="adapter.vectors",
                value=self.new_word.vectors,
            )
        extended = teach(conditioner, self.new_word, None, "adapter.word")
        conditioner.frozen = False  # gradients pass through it, and no context can be cached
        return [extended.rows]


def check_can_learn_words(conditioner: Conditioner, key: str, value: str) -> None:
    """Raise UserError, which names the key, for a conditioner without a CLIP text encoder."""
    net = getattr(conditioner, "net", None)
    if "caption" not in conditioner.reads or not hasattr(net, "get_input_embeddings"):
        raise UserError(
            f"needs a model with a text encoder, and {type(conditioner).__name__} has none",
            key=key,
            value=value,
            remedy=f"Choose a model that reads captions, or remove {key}.",
        )


def teach(
    conditioner: Conditioner,
    new: NewWord,
    vectors: Tensor | None,
    key: str,
    shown: str | None = None,
) -> ExtendedEmbedding:
    """Let a CLIP text encoder know a word, and return its embedding.

    vectors: [n, D] of the word; None copies that of the initial word. key, shown: for
    errors, see `add_word`.
    """
    net = conditioner.net
    extended = add_word(conditioner.tokenizer, net.get_input_embeddings(), new, vectors, key, shown)
    net.set_input_embeddings(extended)
    words = (*conditioner.tokenize.new_words, new)
    conditioner.tokenize = replace(conditioner.tokenize, new_words=words)
    return extended


def add_word(
    tokenizer: CLIPTokenizer,
    embedding: nn.Embedding | ExtendedEmbedding,
    new: NewWord,
    vectors: Tensor | None = None,
    key: str = "adapter.word",
    shown: str | None = None,
) -> ExtendedEmbedding:
    """Add a word to a tokenizer, and return the embedding with its rows.

    vectors: [n, D] of the word; None copies that of the initial word. key: names the word, and
    shown is its value, for errors; None shows the word.

    Raises UserError if the tokenizer knows one of its tokens already, if the initial word is not a
    single token, or if the vectors have another width.
    """
    if len(tokenizer) != embedding.num_embeddings:
        raise UserError(
            f"has a tokenizer of {len(tokenizer)} tokens and {embedding.num_embeddings} "
            "embeddings; new words need as many of both",
            key="model.conditioner.tokenizer",
            value=tokenizer.name_or_path,
        )
    vocabulary = tokenizer.get_vocab()
    known = [token for token in new.tokens if token in vocabulary]
    if len(tokenizer(new.word, add_special_tokens=False).input_ids) == 1:
        known.append(new.word)
    if known:
        raise UserError(
            f"is a token of the text encoder already ({known[0]})",
            key=key,
            value=shown or new.word,
            remedy="Choose a new one, such as <my-word>." if shown is None else "Remove it.",
        )
    if vectors is not None and vectors.shape[1] != embedding.embedding_dim:
        raise UserError(
            f"has vectors of width {vectors.shape[1]}, but the text encoder's have "
            f"{embedding.embedding_dim}: it was learned with another model",
            key=key,
            value=shown or new.word,
            remedy=f"Change {key}, or choose that model.",
        )
    if vectors is None:
        vectors = _initial_vectors(tokenizer, embedding, new)
    tokenizer.add_tokens(new.tokens)
    return ExtendedEmbedding(embedding, vectors)


def _initial_vectors(
    tokenizer: CLIPTokenizer, embedding: nn.Embedding | ExtendedEmbedding, new: NewWord
) -> Tensor:
    initial = tokenizer(new.initial, add_special_tokens=False).input_ids
    if len(initial) != 1:
        raise UserError(
            f"is {len(initial)} tokens",
            key="adapter.initial",
            value=new.initial,
            remedy="Set adapter.initial to a word of a single token.",
        )
    with torch.no_grad():
        return embedding(torch.tensor(initial)).expand(new.vectors, -1)
