"""What data sets of captioned pictures share, wherever their files are: options and splits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sdtrain.data.buckets import bucket_chooser, bucket_sizes, default_step, nearest_size
from sdtrain.data.caption_draw import CaptionDraw
from sdtrain.data.caption_template import CaptionTemplate
from sdtrain.data.crop import Transform
from sdtrain.data.depth import DepthFolder
from sdtrain.data.headers import CropOf
from sdtrain.data.inventory import Inventory
from sdtrain.data.reader import PictureReader, Source
from sdtrain.data.split import (
    BucketChooser,
    DepthOf,
    PictureSplit,
    check_choices,
    check_options,
    split_table,
)


@dataclass(frozen=True, kw_only=True)
class PictureOptions:
    """The options that `images.Images` describes. Raises UserError for one that is not allowed."""

    image_size: int
    crop: Literal["random", "center"]
    flip: bool
    validation_fraction: float
    missing_captions: Literal["error", "empty"]
    on_error: Literal["fail", "skip"]
    max_skipped: int
    captions: Literal["one", "all"]
    shuffle_tags: bool
    drop_tags: float
    keep_tags: int
    caption_template: str | None
    upscale: bool
    buckets: bool
    bucket_step: int | None
    bucket_max_ratio: float
    background: Sequence[int]
    seed: int
    batch_size: int

    def __post_init__(self) -> None:
        check_options(
            image_size=self.image_size,
            validation_fraction=self.validation_fraction,
            background=self.background,
        )
        check_choices(
            missing_captions=self.missing_captions,
            on_error=self.on_error,
            max_skipped=self.max_skipped,
        )
        self.caption_draw()
        self.transform()
        self.template()
        self.bucket_chooser()

    def caption_draw(self) -> CaptionDraw:
        """Return what draws the captions for training."""
        return CaptionDraw(
            captions=self.captions,
            shuffle_tags=self.shuffle_tags,
            drop_tags=self.drop_tags,
            keep_tags=self.keep_tags,
            seed=self.seed,
        )

    def transform(self) -> Transform:
        """Return the transform that crops and mirrors the training pictures."""
        return Transform(image_size=self.image_size, crop=self.crop, flip=self.flip, seed=self.seed)

    def template(self) -> CaptionTemplate | None:
        """Return what makes captions of several columns, or None."""
        return None if self.caption_template is None else CaptionTemplate(self.caption_template)

    def crop_of(self) -> CropOf:
        """Return what tells the crop that a picture has to cover: a square, or its bucket."""
        if not self.buckets:
            return lambda picture: (self.image_size, self.image_size)
        step = self.bucket_step or default_step(self.image_size)
        sizes = bucket_sizes(self.image_size, step, self.bucket_max_ratio)
        return lambda picture: nearest_size(picture, sizes)

    def bucket_chooser(self) -> BucketChooser | None:
        """Return what chooses the sizes of the training pictures, None if they are squares."""
        return bucket_chooser(
            self.buckets,
            self.image_size,
            self.bucket_step,
            self.bucket_max_ratio,
            self.batch_size,
        )


class CaptionedPictures:
    """The splits of captioned pictures.

    Args:
        inventory: of the pictures.
        source: their encoded files.
        options: how they are read.
        depth_of: reads their depth maps; None if there are none.
    """

    def __init__(
        self,
        inventory: Inventory,
        source: Source,
        options: PictureOptions,
        depth_of: DepthOf | None = None,
    ) -> None:
        self.image_size = options.image_size
        self.max_skipped = None
        if options.on_error == "skip":
            self.max_skipped = options.max_skipped - inventory.left_out
        self.sha256 = inventory.sha256
        self.memo = inventory.memo
        self.classes = inventory.classes
        self.num_classes = self.classes.count
        self._splits = split_table(
            table=inventory.table,
            is_held_out=inventory.is_held_out,
            reader=PictureReader(source, options.image_size, options.background),
            training=options.transform(),
            choose_caption=options.caption_draw(),
            seed=options.seed,
            max_skipped=self.max_skipped,
            choose_buckets=options.bucket_chooser(),
            depth_of=depth_of,
        )
        if isinstance(depth_of, DepthFolder) and self.max_skipped is None:
            for split in self._splits.values():
                depth_of.check_complete(split.names)
        self.notes = [*inventory.notes, *self._splits["train"].notes]
        if options.buckets:
            self.notes += self._small_squares_notes()

    def _small_squares_notes(self) -> list[str]:
        """Return a line about held-out pictures that cover their bucket, but not a square."""
        sides = self._splits["validation"].sizes.min(axis=1)
        small = int((sides < self.image_size).sum())
        if not small:
            return []
        return [
            f"{small} of {len(sides)} held-out pictures are scaled up for validation, which reads "
            f"squares of {self.image_size} x {self.image_size}."
        ]

    def split(self, name: str) -> PictureSplit:
        """Return the split "train" or "validation"."""
        return self._splits[name]

    def example_prompts(self, count: int) -> list[str]:
        """Return `count` training captions, spread evenly over the sorted pictures."""
        return self._splits["train"].spread_captions(count)
