"""Captions to tokens, for conditioners with a CLIP tokenizer."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import CLIPTokenizer

from sdtrain.conditioning.interface import Inputs
from sdtrain.conditioning.new_words import NewWord

AT_ONCE = 10_000
"""Captions that are tokenized together to count their tokens, which takes 4 kB for each."""


@dataclass(frozen=True)
class Tokenize:
    """Turns captions into tokens [B, max_length], padded or truncated.

    It holds no network, so that the workers of the data loader can use it.

    new_words: that stand for several tokens, see `NewWord`.
    """

    tokenizer: CLIPTokenizer
    max_length: int
    new_words: tuple[NewWord, ...] = ()

    def _spelled_out(self, captions: Sequence[str]) -> list[str]:
        spelled = list(captions)
        for new in self.new_words:
            spelled = [new.spelled_out(caption) for caption in spelled]
        return spelled

    def __call__(self, captions: Sequence[str]) -> Tensor:
        return self.tokenizer(
            self._spelled_out(captions),
            padding="max_length",
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        ).input_ids

    @property
    def key(self) -> str:
        """A hash of the tokenizer and max_length: the same one means the same tokens."""
        tokenizer = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for name in ("truncation", "padding"):  # how it was called last
            tokenizer.pop(name, None)
        text = json.dumps([tokenizer, self.max_length], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def of_inputs(self, inputs: Inputs) -> Tensor:
        """Return the tokens of a conditioner's inputs, on their device.

        Those that come with the batch are used. A dropped caption is replaced by the empty one.
        """
        device = inputs.dropped.device
        if inputs.tokens is not None:
            return inputs.tokens.to(device)
        captions = replace_dropped(inputs.captions, inputs.dropped)
        return self(captions).to(device)

    def count_truncated(self, captions: Sequence[str]) -> int:
        """Return how many captions have more than max_length tokens."""
        count = 0
        for start in range(0, len(captions), AT_ONCE):
            some = self._spelled_out(captions[start : start + AT_ONCE])
            # verbose: transformers would warn of indexing errors, although nothing longer is ever
            # read.
            tokens = self.tokenizer(some, verbose=False).input_ids
            count += sum(len(each) > self.max_length for each in tokens)
        return count


def replace_dropped(captions: Sequence[str], dropped: Tensor) -> list[str]:
    """Return the captions, with the empty one in place of those that are dropped [B]."""
    kept = []
    for caption, is_dropped in zip(captions, dropped.tolist(), strict=True):
        kept.append("" if is_dropped else caption)
    return kept
