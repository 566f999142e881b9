"""Check the keys of data.prior, as far as that needs no pictures."""

from sdtrain.errors import UserError

PRIOR_KEYS = ("prior", "prior_prompt", "prior_images", "prior_weight")
"""Keys of the data set that say what its prior is."""

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
    if data.get("prior_weight", 1.0) <= 0:
        raise UserError(
            "must be above 0",
            key="data.prior_weight",
            value=data["prior_weight"],
            remedy="Remove data.prior to train without these pictures.",
        )
    if data.get("prior_images", 1) < 1:
        raise UserError("must be at least 1", key="data.prior_images", value=data["prior_images"])
