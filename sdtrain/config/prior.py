"""Check the keys of data.prior, as far as that needs no pictures."""

import math

from sdtrain.config.check import check_value
from sdtrain.errors import UserError

PRIOR_KEYS = ("prior", "prior_prompt", "prior_images", "prior_weight")
"""Keys of the data set that say what its prior is."""

LEAST_IMAGES = 2
"""Fewest pictures of a folder that is read."""

WITHOUT = ("buckets", "depth", "depth_model")
"""Keys of the data set that have no meaning for a prior."""


def check_prior(data: dict, typed: set[str], *, trains_autoencoder: bool) -> None:
    """Raise UserError for keys of a prior that have no effect, or do not fit the others."""
    if "prior" not in data:
        return
    if data["prior"] is None:
        for name in PRIOR_KEYS:
            if f"data.{name}" in typed and data.get(name) is not None:
                raise UserError(
                    f"data.{name} has no effect without data.prior",
                    key=f"data.{name}",
                    remedy="Set data.prior to a folder, or remove it.",
                )
        return
    if trains_autoencoder:
        raise UserError(
            "data.prior has no effect when an autoencoder is trained",
            key="data.prior",
            remedy="Remove it.",
        )
    for name in WITHOUT:
        if data.get(name):
            raise UserError(
                f"cannot be used together with data.{name}={data[name]}",
                key="data.prior",
                value=data["prior"],
                remedy=f"Remove data.prior or data.{name}.",
            )
    if data["prior"] == data.get("path"):
        raise UserError(
            "is the folder of the subject itself, data.path",
            key="data.prior",
            value=data["prior"],
            remedy="Set it to pictures of other members of the class.",
        )
    check_value(data.get("prior_weight", 1.0), float, "data.prior_weight")
    check_value(data.get("prior_images", LEAST_IMAGES), int, "data.prior_images")
    if not 0 < data.get("prior_weight", 1.0) < math.inf:
        raise UserError(
            "must be a finite number above 0",
            key="data.prior_weight",
            value=data["prior_weight"],
            remedy="Remove data.prior to train without these pictures.",
        )
    if data.get("prior_images", LEAST_IMAGES) < LEAST_IMAGES:
        raise UserError(
            f"must be at least {LEAST_IMAGES}",
            key="data.prior_images",
            value=data["prior_images"],
        )
