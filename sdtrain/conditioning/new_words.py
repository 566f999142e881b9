"""Words that a text encoder has been taught, and how captions are spelled with them."""

import re
from dataclasses import dataclass
from itertools import count

from transformers import CLIPTokenizer


@dataclass(frozen=True)
class NewWord:
    """A word for which vectors are learned.

    word: as it is written in captions, such as "<cat>". initial: the word with whose embedding the
    vectors begin. vectors: their number.
    """

    word: str
    initial: str = ""
    vectors: int = 1

    @property
    def tokens(self) -> list[str]:
        """The tokens that stand for the word, named as diffusers names them."""
        return [self.word, *(f"{self.word}_{number}" for number in range(1, self.vectors))]

    def spelled_out(self, caption: str) -> str:
        """Return a caption with all tokens of the word where the word stands."""
        if self.vectors == 1:
            return caption
        pattern = re.escape(self.word) + r"(?!_\d)"
        spelled = " ".join(self.tokens)
        return re.sub(pattern, lambda match: spelled, caption, flags=re.IGNORECASE)


def words_of(tokenizer: CLIPTokenizer) -> tuple[NewWord, ...]:
    """Return the words of several tokens that a tokenizer has been taught, as diffusers names them:
    <cat>, <cat>_1, <cat>_2.
    """
    added = tokenizer.get_added_vocab()
    words = []
    for token in added:
        vectors = next(number for number in count(1) if f"{token}_{number}" not in added)
        if vectors > 1:
            words.append(NewWord(token, vectors=vectors))
    return tuple(words)
