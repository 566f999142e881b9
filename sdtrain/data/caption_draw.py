"""Which caption a visit to a picture reads: keyed draws among several, and of their tags."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from sdtrain.data.split import bad_option
from sdtrain.randomness import KeyedRandom

CHOICE, SHUFFLE, DROP = range(3)
"""Indices of the draws of one visit, so that no setting shifts the draws of another."""


class CaptionDraw:
    """A pure function of (captions, seed, ordinal).

    Args:
        captions: "all" joins the captions of a picture to one, "one" draws one of them.
        shuffle_tags: whether the tags of a caption, which commas part, come in any order.
        drop_tags: the share of them that is left out. One always stays: a caption that is left out
            whole is model.caption_dropout's.
        keep_tags: how many of the first neither move nor are left out.
        seed: of the draws.
    """

    def __init__(
        self,
        *,
        captions: Literal["one", "all"],
        shuffle_tags: bool,
        drop_tags: float,
        keep_tags: int,
        seed: int,
    ) -> None:
        if captions not in ("one", "all"):
            raise bad_option("captions", captions, "is none of one, all")
        if not 0 <= drop_tags < 1:
            raise bad_option("drop_tags", drop_tags, "must be at least 0 and below 1")
        if keep_tags < 0:
            raise bad_option("keep_tags", keep_tags, "must be at least 0")
        if keep_tags and not shuffle_tags and not drop_tags:
            problem = "has no effect without data.shuffle_tags=true or data.drop_tags"
            raise bad_option("keep_tags", keep_tags, problem)
        self.captions = captions
        self.shuffle_tags = shuffle_tags
        self.drop_tags = drop_tags
        self.keep_tags = keep_tags
        self._random = KeyedRandom(seed, "caption")

    def read(self, captions: Sequence[str]) -> tuple[str, ...]:
        """What is drawn from: all captions of a picture, or the one that they are joined to."""
        if self.captions == "one":
            return tuple(captions)
        of_tags = self.shuffle_tags or self.drop_tags
        return ((", " if of_tags else " ").join(captions),)  # no tag goes across a line's end

    def __call__(self, captions: Sequence[str], ordinal: int) -> str:
        caption = captions[0]
        if len(captions) > 1:
            caption = captions[int(self._random.uniform(ordinal, 1, CHOICE)[0] * len(captions))]
        if not self.shuffle_tags and not self.drop_tags:
            return caption
        tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
        moving = np.array(tags[self.keep_tags :], dtype=object)
        if self.shuffle_tags:
            moving = moving[self._random.uniform(ordinal, len(moving), SHUFFLE).argsort()]
        if self.drop_tags:
            moving = self._without_dropped(moving, ordinal)
        return ", ".join([*tags[: self.keep_tags], *moving])

    def _without_dropped(self, tags: np.ndarray, ordinal: int) -> np.ndarray:
        draws = self._random.uniform(ordinal, len(tags), DROP)
        stays = draws >= self.drop_tags
        if len(tags) and not self.keep_tags:
            stays[draws.argmax()] = True
        return tags[stays]
