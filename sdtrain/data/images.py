"""A folder of captioned pictures.

The captions are parsed by `captions.py`, so that an error can name file and line. The imagefolder
loader of datasets is not used, because it silently drops pictures without a row.
"""

from collections.abc import Sequence
from typing import Literal

from sdtrain.data.buckets import bucket_chooser
from sdtrain.data.caption_draw import CaptionDraw
from sdtrain.data.crop import Transform
from sdtrain.data.decode import WHITE
from sdtrain.data.inventory import Inventory
from sdtrain.data.list_images import ListOptions, folder_of, inventory_of
from sdtrain.data.listed_folder import ListedFolder
from sdtrain.data.reader import PictureReader
from sdtrain.data.split import PictureSplit, check_options, split_table


class Images:
    """A folder of pictures with captions.

    The captions are in metadata.jsonl or metadata.csv, or in a .txt file beside each picture. A
    column weight of the metadata says how often a picture is visited, see `order.Visits`.
    Subfolders and linked folders are included, names that begin with a dot are not. Construction
    reads the headers of the pictures that no earlier one has listed. Pixels are read on access; a
    file that has changed since it was listed then raises ChangedFileError. Raises DataError for a
    problem in the folder, UserError for an argument that is not allowed.

    Args:
        path: the folder.
        image_size: side of the squares in pixels.
        crop: how a square is cut from a training picture.
        flip: whether half of the training pictures are mirrored.
        validation_fraction: share of the pictures that is held out, see `hold_out_count`.
        missing_captions: "error" raises DataError for a picture without a caption, "empty" trains
            it with an empty one.
        on_error: "fail" raises DataError for a bad picture. "skip" leaves out pictures with a bad
            header, with a line in `notes`, and replaces a picture whose pixels turn out to be
            broken later by another one of its split.
        max_skipped: how many different pictures may be left out or replaced. A count and not a
            share: somebody can inspect each of them, while a share of a large folder would hide a
            failing disk.
        captions, shuffle_tags, drop_tags, keep_tags: for training, see `CaptionDraw`; validation
            reads the first caption unchanged.
        upscale: whether pictures smaller than the crop are scaled up; otherwise they count as bad.
        buckets, bucket_step, bucket_max_ratio: whether training pictures are cropped to sizes of
            about their own shape, and which these are, see `buckets.bucket_sizes`.
        background: (red, green, blue) in 0..255 behind transparent pixels.
        refresh: whether the folder is listed anew, although the listing that an earlier start has
            stored seems to hold, see `take_inventory`.
        seed: of crops, flips, captions, replacements and the hold-out.
        batch_size: of the run; the least number of pictures in a bucket. Set by sdtrain.
    """

    def __init__(
        self,
        *,
        path: str,
        image_size: int = 32,
        crop: Literal["random", "center"] = "center",
        flip: bool = False,
        validation_fraction: float = 0.05,
        missing_captions: Literal["error", "empty"] = "error",
        on_error: Literal["fail", "skip"] = "fail",
        max_skipped: int = 100,
        captions: Literal["one", "all"] = "all",
        shuffle_tags: bool = False,
        drop_tags: float = 0.0,
        keep_tags: int = 0,
        upscale: bool = False,
        buckets: bool = False,
        bucket_step: int | None = None,
        bucket_max_ratio: float = 2.0,
        background: Sequence[int] = WHITE,
        refresh: bool = False,
        seed: int = 0,
        batch_size: int = 1,
    ) -> None:
        check_options(
            image_size=image_size, validation_fraction=validation_fraction, background=background
        )
        caption_draw = CaptionDraw(
            captions=captions,
            shuffle_tags=shuffle_tags,
            drop_tags=drop_tags,
            keep_tags=keep_tags,
            seed=seed,
        )
        bucketing = bucket_chooser(buckets, image_size, bucket_step, bucket_max_ratio, batch_size)
        training = Transform(image_size=image_size, crop=crop, flip=flip, seed=seed)
        self.image_size = image_size
        options = ListOptions(
            image_size=image_size,
            upscale=upscale,
            missing_captions=missing_captions,
            on_error=on_error,
            max_skipped=max_skipped,
            validation_fraction=validation_fraction,
            seed=seed,
        )
        folder = folder_of(path)
        inventory = inventory_of(folder, options, caption_draw, refresh=refresh)
        self._take_over(inventory, options)
        self._splits = split_table(
            table=inventory.table,
            is_held_out=inventory.is_held_out,
            reader=PictureReader(ListedFolder(folder, inventory.table), image_size, background),
            training=training,
            choose_caption=caption_draw,
            seed=seed,
            max_skipped=self.max_skipped,
            choose_buckets=bucketing,
        )
        self.notes = [*inventory.notes, *self._splits["train"].notes]

    def _take_over(self, inventory: Inventory, options: ListOptions) -> None:
        """Set the attributes that come from the inventory, see `types.DataExtras`."""
        self.max_skipped = None
        if options.on_error == "skip":
            self.max_skipped = options.max_skipped - inventory.left_out
        self.sha256 = inventory.sha256
        self.memo = inventory.memo
        self.classes = inventory.classes
        self.num_classes = self.classes.count

    def split(self, name: str) -> PictureSplit:
        """Return the split "train" or "validation"."""
        return self._splits[name]

    def example_prompts(self, count: int) -> list[str]:
        """Return `count` training captions, spread evenly over the sorted files."""
        return self._splits["train"].spread_captions(count)
