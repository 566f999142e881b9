"""Check `data.cache` and the section `cache`, as far as that needs neither torch nor pictures."""

import os
from collections.abc import Iterable

from sdtrain.config.check import Checker, check_value
from sdtrain.config.overrides import typed_keys
from sdtrain.config.schema import CacheSettings
from sdtrain.errors import UserError

KEY = "data.cache"
OFF = "off"
AUTO = "auto"
NO_CACHE = "Set data.cache=off."

DRAWN = ("sdtrain.data.shapes.Shapes", "sdtrain.data.emoji.Emoji")
"""Data sets whose pictures are drawn, and not read."""

PIXELS = "sdtrain.models.autoencoder.Pixels"


def with_cache_on(config: dict, overrides: Iterable[str]) -> dict:
    """Return a copy of a configuration whose data.cache is auto instead of off.

    For a command that makes the cache. Raises UserError if the user typed data.cache=off, unless
    depth maps remain to be made.
    """
    data = config.get("data")
    if not isinstance(data, dict) or data.get("cache", OFF) not in (OFF, False, None):
        return config
    if KEY in typed_keys(overrides):
        if data.get("depth_model"):  # of which depth maps remain to be made
            return config
        raise UserError(
            "leaves nothing to compute",
            key=KEY,
            value=OFF,
            remedy="Set data.cache=auto or data.cache=FOLDER, or leave it out for auto.",
        )
    return config | {"data": data | {"cache": AUTO}}


def fill_in_cache(config: dict, checker: Checker) -> None:
    """Check the types of the keys, fill in the defaults, and make the path of a folder absolute.

    Changes `config`. Raises UserError.
    """
    config["cache"] = config.get("cache") or {"dtype": CacheSettings.dtype}
    checker.call(config["cache"], "cache", CacheSettings)
    data = config["data"]
    if not data.get("cache", OFF):  # `off` is false in yaml
        data["cache"] = OFF
    cache = data.setdefault("cache", OFF)
    check_value(cache, str, KEY)
    if cache not in (OFF, AUTO):
        data["cache"] = os.path.abspath(os.path.expanduser(cache))


def check_cache(config: dict, typed: set[str], *, trains_autoencoder: bool) -> None:
    """Raise UserError for a cache of what has no cached form, or a setting without effect.

    config: as `fill_in_cache` has left it. typed: the keys that the user typed.
    """
    data = config["data"]
    if data["cache"] == OFF:
        if "cache.dtype" in typed:
            raise UserError(
                "cache.dtype has no effect with data.cache=off",
                key="cache.dtype",
                remedy="Remove it, or set data.cache=auto or data.cache=FOLDER.",
            )
        return
    if data["cache"] != AUTO and os.path.isfile(data["cache"]):
        raise UserError(
            "is a file, and has to be a folder",
            key=KEY,
            value=data["cache"],
            remedy="Set data.cache to a folder, which need not exist, or to auto.",
        )
    if trains_autoencoder:
        problem = "has no effect when an autoencoder is trained: it reads the pictures themselves"
        raise UserError(problem, key=KEY, value=data["cache"], remedy=NO_CACHE)
    if data["_target_"] in DRAWN:
        raise drawn_error(data["_target_"].rpartition(".")[2])
    if data["_target_"].startswith("sdtrain.") and data.get("crop") == "random":
        raise random_crop_error()
    autoencoder = config["model"].get("autoencoder") or {}
    if autoencoder.get("_target_") == PIXELS:
        raise UserError(
            "has no effect in pixel space: there is no autoencoder whose work could be saved",
            key=KEY,
            value=data["cache"],
            remedy=NO_CACHE,
        )


def drawn_error(name: str) -> UserError:
    """Return the error for a data set, by its class, that has no pictures of its own to cache."""
    return UserError(
        f"{name} draws its pictures, which have no cached form",
        key=KEY,
        remedy="Leave data.cache off, or choose data=images or data=dataset, whose pictures can be "
        "cached.",
    )


def random_crop_error() -> UserError:
    """Return the error for random crops: each visit sees another part of the picture."""
    return UserError(
        "has no cached form: each visit sees another part of the picture",
        key="data.crop",
        value="random",
        remedy="Set data.crop=center, or data.cache=off.",
    )
