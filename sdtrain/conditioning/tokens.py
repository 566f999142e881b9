"""Captions to tokens, for conditioners with a CLIP tokenizer."""

from collections.abc import Sequence

from torch import Tensor
from transformers import CLIPTokenizer

from sdtrain.conditioning.interface import Inputs


def tokenize(tokenizer: CLIPTokenizer, inputs: Inputs, max_length: int) -> Tensor:
    """Return the tokens [B, max_length] of the captions, padded or truncated, on their device.

    A dropped caption is replaced by the empty one.
    """
    captions = []
    for caption, dropped in zip(inputs.captions, inputs.dropped.tolist(), strict=True):
        captions.append("" if dropped else caption)
    tokens = tokenizer(
        captions,
        padding="max_length",
        truncation=True,
        max_length=max_length,
        return_tensors="pt",
    ).input_ids
    return tokens.to(inputs.dropped.device)


def count_truncated(tokenizer: CLIPTokenizer, captions: Sequence[str], max_length: int) -> int:
    """Return how many captions have more than max_length tokens."""
    # verbose: transformers would warn of indexing errors, although nothing longer is ever read.
    tokens = tokenizer(list(captions), verbose=False).input_ids
    return sum(len(each) > max_length for each in tokens)
