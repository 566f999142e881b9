"""Train the small CLIP tokenizer in data/tokenizer: byte pairs learned from captions.

    python -m sdtrain.conditioning.tokenizer FOLDER CAPTIONS.txt

CAPTIONS.txt contains one caption a line; the names of Unicode's symbols are added to them. Bytes
that no pair covers remain tokens of their own, so every string can be tokenized.
"""

import json
import sys
import tempfile
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

SPECIAL_TOKENS = ["<|startoftext|>", "<|endoftext|>"]
WORD_PATTERN = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
"""How CLIP splits text into words."""


def symbol_names() -> list[str]:
    """Return the lower-case names of Unicode's symbols, including emoji."""
    names = []
    for code in range(0x2000, 0x20000):
        name = unicodedata.name(chr(code), "")
        if name and unicodedata.category(chr(code)) == "So":
            names.append(name.lower())
    return names


def train_tokenizer(captions: Iterable[str], vocabulary_size: int) -> CLIPTokenizer:
    """Train a CLIP tokenizer of at most vocabulary_size tokens.

    They are 256 bytes, each also as the end of a word, two special tokens and the merged pairs.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    learner.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=vocabulary_size - 2 * len(alphabet),
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            min_frequency=2,
            show_progress=False,
        ),
    )
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    tokens = list(alphabet)
    tokens += [byte + "</w>" for byte in alphabet]
    tokens += map("".join, merges)
    distinct = dict.fromkeys(tokens + SPECIAL_TOKENS)
    vocabulary = dict(zip(distinct, range(len(distinct)), strict=True))
    return CLIPTokenizer(vocab=vocabulary, merges=merges)


def main() -> None:
    """Run the command that the docstring of this file describes."""
    folder = Path(sys.argv[1])
    captions = Path(sys.argv[2]).read_text(encoding="utf-8").splitlines()
    with tempfile.TemporaryDirectory() as scratch:
        train_tokenizer(captions + symbol_names(), vocabulary_size=2048).save_pretrained(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((Path(scratch) / name).read_bytes())


if __name__ == "__main__":
    main()
