"""The rules for resuming a run: which keys of its configuration may change. Needs no torch."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from sdtrain.errors import DataError, UserError

FIXED_ON_RESUME = (
    "seed",
    "data",
    "model",
    "adapter",
    "schedule",
    "modifiers",
    "prediction",
    "weighting",
    "loss",
    "times",
    "noise",
    "optimizer._target_",
    "cache",
)
"""Keys and groups that must not change, because that would make it a different run."""

FREE_ON_RESUME = (
    "data.num_workers",
    "data.timeout",
    "data.on_error",
    "data.max_skipped",
    "data.refresh",
)
"""Keys in those groups that may change nevertheless."""

FIXED_IN_A_SWEEP = (*FIXED_ON_RESUME, "optimizer", "lr_schedule", "trainer", "callbacks.ema")
"""Keys and groups in which a run in an arm's folder must agree with the arm. They include the
training length, because arms are compared at the same length.
"""

FREE_IN_A_SWEEP = (
    *FREE_ON_RESUME,
    "trainer.log_every",
    "trainer.threads",
    "trainer.deterministic",
    "trainer.accelerator",
    "trainer.devices",
)
"""Keys in those groups that may change nevertheless."""

PATHS_AS_TYPED = ("data.path", "model.pretrained")
"""Paths that earlier versions saved as the user typed them."""

ADDED_BY_RUN = re.compile(r"data[.]sha256|model[.]\w+[.]((files_)?sha256|latent_shift)")
"""Keys that a run adds to its own configuration once it is built: the hashes of the data's listing,
of the weights of each frozen part and of the files that a part reads, and whether an autoencoder
shifts its latents.
"""

FILLED_FROM_PRETRAINED = (
    "model.unet.architecture",
    "model.unet.weights",
    "model.conditioner.architecture",
    "model.conditioner.weights",
    "model.conditioner.tokenizer",
    "model.autoencoder.path",
)
"""Folders that model.pretrained fills in. Those of a single file and of a repository on the hub are
in a cache, which may lie elsewhere when a run is resumed; the hashes of the files are compared."""

FILLED_FROM_DATA = ("model.conditioner.num_classes", "model.conditioner.class_names")
"""Keys that a run fills in once it has read its data, unless the user has set them."""


LONGEST_LIST = 20
"""Longest list that a message shows."""


@dataclass(frozen=True)
class Changes:
    """The differences between two configurations, as {dotted key: (old value, new value)}.

    Args:
        changed: all differences.
        refused: those with which the run must not be resumed.
    """

    changed: dict[str, tuple[Any, Any]]
    refused: dict[str, tuple[Any, Any]]


def flatten(node: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every leaf and every inner node."""
    for key, value in node.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")


def flatten_leaves(node: dict) -> dict[str, Any]:
    """Return {dotted key: value} of the leaves."""
    return {key: value for key, value in flatten(node) if not isinstance(value, dict)}


def is_below(key: str, prefixes: Iterable[str]) -> bool:
    """Whether the key is one of the prefixes or lies below one."""
    return any(f"{key}.".startswith(f"{prefix}.") for prefix in prefixes)


def is_added_by_run(key: str) -> bool:
    """Whether a run itself adds the key to its configuration, and not the user."""
    return ADDED_BY_RUN.fullmatch(key) is not None


def compare_configs(old: dict, new: dict, allowed: Iterable[str] = ()) -> Changes:
    """Return the leaves that differ between a saved configuration and a new one.

    allowed: keys or groups whose change the user allows with `resume_allow`.
    """
    return _compare(old, new, FIXED_ON_RESUME, (*FREE_ON_RESUME, *allowed))


def may_resume(old: dict, new: dict, allowed: Iterable[str] = ()) -> bool:
    """Whether a run with a saved configuration may be resumed with one that is not built yet."""
    return not _without_unknown(compare_configs(old, new, allowed)).refused


def compare_arm_configs(old: dict, new: dict, allowed: Iterable[str] = ()) -> Changes:
    """Compare the run in the folder of a sweep's arm with the arm, which is not built yet."""
    return _without_unknown(_compare(old, new, FIXED_IN_A_SWEEP, (*FREE_IN_A_SWEEP, *allowed)))


def arm_digest(config: dict) -> str:
    """Return a hash of the keys that are fixed in a sweep: equal for arms that train the same."""
    leaves = []
    for key, value in sorted(flatten_leaves(config).items()):
        if is_below(key, FIXED_IN_A_SWEEP) and not is_below(key, FREE_IN_A_SWEEP):
            leaves.append([key, value])
    return hashlib.sha256(json.dumps(leaves).encode()).hexdigest()


def _without_unknown(changes: Changes) -> Changes:
    """Do not refuse changes of keys that are unknown until the new configuration is built."""
    refused = {}
    for key, (old, new) in changes.refused.items():
        is_unknown = is_added_by_run(key) or key in FILLED_FROM_DATA and new is None
        if not is_unknown:
            refused[key] = (old, new)
    return Changes(changes.changed, refused)


def _is_same_path(old: Any, new: Any) -> bool:
    """Whether two paths are the same. Earlier versions saved the old one as the user typed it."""
    return isinstance(old, str) and isinstance(new, str) and os.path.abspath(old) == new


def _is_moved_cache(key: str, old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether a folder that the same model.pretrained fills in lies elsewhere."""
    names = ("model.pretrained", "model.revision", "model.variant")
    if key not in FILLED_FROM_PRETRAINED or new.get("model.pretrained") is None:
        return False
    if any(old.get(name) != new.get(name) for name in names):
        return False
    folders = (str(old.get(key)), str(new.get(key)))
    return os.path.basename(folders[0]) == os.path.basename(folders[1])


def _is_same_cache(key: str, old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether both read the same bits: from a cache, wherever it is, or both from the pictures.

    The latents of a cache were computed in batches of another size and differ by their rounding, so
    a run does not change from one to the other. None: saved by an earlier version. Without a cache
    its dtype means nothing.
    """
    had_cache = old.get("data.cache") not in (None, "off")
    has_cache = new.get("data.cache") not in (None, "off")
    if key == "cache.dtype":
        return not (had_cache and has_cache)
    return key == "data.cache" and had_cache == has_cache


def _compare(old: dict, new: dict, fixed: Iterable[str], free: Iterable[str]) -> Changes:
    old_values = dict(flatten(old))
    new_values = dict(flatten(new))
    changed = {}
    refused = {}
    for key in sorted(old_values.keys() | new_values.keys()):
        pair = (old_values.get(key), new_values.get(key))
        if isinstance(new_values.get(key, old_values.get(key)), dict):
            continue  # not a leaf
        if pair[0] == pair[1] or key in PATHS_AS_TYPED and _is_same_path(*pair):
            continue
        if _is_moved_cache(key, old_values, new_values) or _is_same_cache(
            key, old_values, new_values
        ):
            continue
        if is_added_by_run(key) and pair[0] is None:
            continue  # saved by an earlier version, which did not add this key
        changed[key] = pair
        if is_below(key, fixed) and not is_below(key, free):
            refused[key] = pair
    return Changes(changed, refused)


def format_changes(changes: dict[str, tuple[Any, Any]]) -> str:
    """Return "key: old -> new" of each change, in one line."""
    return ", ".join(
        f"{key}: {_shortened(old)} -> {_shortened(new)}" for key, (old, new) in changes.items()
    )


def _shortened(value: Any) -> Any:
    """Return how many values a long list has, and anything else as it is."""
    is_long = isinstance(value, list) and len(value) > LONGEST_LIST
    return f"{len(value)} values" if is_long else value


def refuse_different_ranks(configs: list[str]) -> None:
    """Raise an error if the configuration of a rank differs from that of rank 0.

    It is a DataError if they differ only in the data, otherwise a UserError.

    configs: the yaml of each rank, by rank.
    """
    first = OmegaConf.to_container(OmegaConf.create(configs[0]))
    for rank, config in enumerate(configs):
        changed = compare_configs(first, OmegaConf.to_container(OmegaConf.create(config))).changed
        if not changed:
            continue
        only_data = all(is_below(key, ["data"]) for key in changed)
        error_class = DataError if only_data else UserError
        raise error_class(
            f"Rank {rank} has another configuration than rank 0 ({format_changes(changed)})",
            key=next(iter(changed)),
            remedy="Give all ranks the same command, data and sdtrain.",
        )
