"""A folder of captioned pictures.

The captions are parsed by `captions.py`, so that an error can name file and line. The imagefolder
loader of datasets is not used, because it silently drops pictures without a row.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from sdtrain.data.caption_template import escaped
from sdtrain.data.captioned import CaptionedPictures, PictureOptions
from sdtrain.data.decode import WHITE
from sdtrain.data.depth import depth_of_folder
from sdtrain.data.list_images import folder_of, inventory_of
from sdtrain.data.listed_folder import ListedFolder
from sdtrain.errors import DataError
from sdtrain.types import Prior


class Images(CaptionedPictures):
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
        caption_template: makes the captions of columns of the metadata, see `CaptionTemplate`.
        upscale: whether pictures smaller than the crop are scaled up; otherwise they count as bad.
        buckets, bucket_step, bucket_max_ratio: whether training pictures are cropped to sizes of
            about their own shape, and which these are, see `buckets.bucket_sizes`.
        background: (red, green, blue) in 0..255 behind transparent pixels.
        depth: folder with a depth map for each picture, see `DepthFolder`; None: there are none.
        depth_model: depth model of transformers, a folder or hub id, that makes the depth maps
            which are missing in that folder, by default one in the user's cache; None makes none.
        prior: folder of pictures of the class of a subject, to train in turn with its own, see
            `types.Prior`; None: there are none.
        prior_prompt: the caption of all of them; None reads their own.
        prior_images: how many of them a run with prior_prompt draws first, if the folder has none.
        prior_weight: of their losses, beside 1 for the others.
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
        caption_template: str | None = None,
        upscale: bool = False,
        buckets: bool = False,
        bucket_step: int | None = None,
        bucket_max_ratio: float = 2.0,
        background: Sequence[int] = WHITE,
        depth: str | None = None,
        depth_model: str | None = None,
        prior: str | None = None,
        prior_prompt: str | None = None,
        prior_images: int = 200,
        prior_weight: float = 1.0,
        refresh: bool = False,
        seed: int = 0,
        batch_size: int = 1,
    ) -> None:
        options = PictureOptions(
            image_size=image_size,
            crop=crop,
            flip=flip,
            validation_fraction=validation_fraction,
            missing_captions=missing_captions,
            on_error=on_error,
            max_skipped=max_skipped,
            captions=captions,
            shuffle_tags=shuffle_tags,
            drop_tags=drop_tags,
            keep_tags=keep_tags,
            caption_template=caption_template,
            upscale=upscale,
            buckets=buckets,
            bucket_step=bucket_step,
            bucket_max_ratio=bucket_max_ratio,
            background=background,
            seed=seed,
            batch_size=batch_size,
        )
        folder = folder_of(path)
        inventory = inventory_of(folder, options, refresh=refresh)
        depth_of = depth_of_folder(depth, depth_model, str(folder))
        super().__init__(inventory, ListedFolder(folder, inventory.table), options, depth_of)
        if prior is not None:
            self._add_prior(prior, prior_prompt, prior_weight, options, refresh=refresh)

    def _add_prior(
        self,
        path: str,
        prompt: str | None,
        weight: float,
        options: PictureOptions,
        *,
        refresh: bool,
    ) -> None:
        """Read the pictures of the class of the subject. Raises DataError, which names data.prior.

        prompt, weight: the arguments prior_prompt and prior_weight of the constructor.
        """
        template = None if prompt is None else escaped(prompt)
        options = replace(options, caption_template=template)
        try:
            folder = folder_of(path)
            inventory = inventory_of(folder, options, refresh=refresh).without_hold_out()
            pictures = CaptionedPictures(inventory, ListedFolder(folder, inventory.table), options)
        except DataError as error:
            shown = {"value": path} if error.has_value else {}
            raise DataError(
                error.problem.replace("data.path", "data.prior"),
                key="data.prior",
                remedy="Set data.prior to a folder of captioned pictures. With data.prior_prompt "
                "one caption is that of all, and the model draws them first if there are none.",
                **shown,
            ) from error
        self.prior = Prior(pictures, weight)
        self.sha256 = hashlib.sha256(f"{self.sha256}{pictures.sha256}".encode()).hexdigest()
        count = len(pictures.split("train"))
        self.notes.append(
            f"data.prior: every second picture is one of {count} in {folder}, with weight "
            f"{weight:g} in the loss."
        )
