"""Choose the caption for one visit to a picture, with shuffled and dropped tags."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from sdtrain.data.split import option_error
from sdtrain.randomness import KeyedRandom

CHOICE, SHUFFLE, DROP = range(3)
"""Indices of the random draws of one visit, so that no setting changes the draws of another."""


class CaptionDraw:
    """Choose and augment the caption of one visit: a pure function of (captions, seed, ordinal).

    Args:
        captions: "all" joins all captions of a picture, "one" draws one of them at random.
        shuffle_tags: whether the comma-separated tags of a caption are shuffled.
        drop_tags: the probability of dropping each tag. One tag always stays: dropping whole
            captions is the job of model.caption_dropout.
        keep_tags: how many of the first tags are neither moved nor dropped.
        seed: of the random draws.

    Raises UserError for a value that is not allowed.
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
            raise option_error("captions", captions, "is none of one, all")
        if not 0 <= drop_tags < 1:
            raise option_error("drop_tags", drop_tags, "must be at least 0 and below 1")
        if keep_tags < 0:
            raise option_error("keep_tags", keep_tags, "must be at least 0")
        if keep_tags and not shuffle_tags and not drop_tags:
            problem = "has no effect without data.shuffle_tags=true or data.drop_tags"
            raise option_error("keep_tags", keep_tags, problem)
        self.captions = captions
        self.shuffle_tags = shuffle_tags
        self.drop_tags = drop_tags
        self.keep_tags = keep_tags
        self.has_tags = bool(shuffle_tags or drop_tags)
        """Whether captions are lists of tags."""
        self._random = KeyedRandom(seed, "caption")

    @property
    def changes_captions(self) -> bool:
        """Whether a visit may read something else than one of the candidates."""
        return self.shuffle_tags or bool(self.drop_tags)

    def candidates(self, captions: Sequence[str]) -> tuple[str, ...]:
        """Return the captions to draw from: all of a picture's, or a single one that joins them."""
        if self.captions == "one":
            return tuple(captions)
        # A comma keeps the last tag of a line apart from the first of the next.
        separator = ", " if self.has_tags else " "
        return (separator.join(captions),)

    def __call__(self, captions: Sequence[str], ordinal: int) -> str:
        """Return the caption for the visit `ordinal`.

        captions: what `candidates` returned for the picture.
        """
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
            moving = self._drop(moving, ordinal)
        return ", ".join([*tags[: self.keep_tags], *moving])

    def _drop(self, tags: np.ndarray, ordinal: int) -> np.ndarray:
        """Return the tags that stay: at least one, unless keep_tags keeps others already."""
        draws = self._random.uniform(ordinal, len(tags), DROP)
        stays = draws >= self.drop_tags
        if len(tags) and not self.keep_tags:
            stays[draws.argmax()] = True
        return tags[stays]
