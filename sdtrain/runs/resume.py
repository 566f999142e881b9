"""Which configurations a run may go on with: the rules of `resume`, and how two configurations are
compared. Without torch.
"""

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
    "schedule",
    "modifiers",
    "prediction",
    "weighting",
    "loss",
    "times",
    "noise",
    "optimizer._target_",
)
"""Keys, and groups of keys, whose change would make another run of it."""

FREE_ON_RESUME = ("data.num_workers", "data.timeout", "data.on_error", "data.max_skipped")
"""Keys in those groups that may change all the same."""

FIXED_IN_A_SWEEP = (*FIXED_ON_RESUME, "optimizer", "lr_schedule", "trainer", "callbacks.ema")
"""A run that lies in an arm's folder must agree in these. In the budget too: arms are compared at
the same one.
"""

FREE_IN_A_SWEEP = (
    *FREE_ON_RESUME,
    "trainer.log_every",
    "trainer.threads",
    "trainer.deterministic",
    "trainer.accelerator",
    "trainer.devices",
)
"""Keys in those groups that may change all the same."""

HASH = re.compile(r"data[.]sha256|model[.]\w+[.]((files_)?sha256|latent_shift)")
"""Keys that a run adds to its own configuration once it is built: hashes of the data's
listing, of the weights of each frozen part, and of the files that a part reads; and whether an
autoencoder's latents are shifted.
"""

LEFT_TO_THE_DATA = ("model.conditioner.num_classes", "model.conditioner.class_names")
"""Keys that a run fills in once its data are there, unless the user has."""


@dataclass(frozen=True)
class Changes:
    """What differs between two configurations: dotted key -> (old value, new value). refused: those
    that make another run.
    """

    changed: dict[str, tuple[Any, Any]]
    refused: dict[str, tuple[Any, Any]]


def flat(node: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf and every inner node."""
    for key, value in node.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")


def flat_leaves(node: dict) -> dict[str, Any]:
    """{dotted key: value} of the leaves."""
    return {key: value for key, value in flat(node) if not isinstance(value, dict)}


def is_below(key: str, prefixes: Iterable[str]) -> bool:
    """Whether the key is one of the prefixes, or lies below one."""
    return any(f"{key}.".startswith(f"{prefix}.") for prefix in prefixes)


def is_hash(key: str) -> bool:
    """Whether a run itself writes the key into its configuration, and no user."""
    return HASH.fullmatch(key) is not None


def compare_configs(old: dict, new: dict, allowed: Iterable[str] = ()) -> Changes:
    """The leaves that differ. allowed: keys or groups that the user lets differ, `resume_allow`."""
    return _compare(old, new, FIXED_ON_RESUME, (*FREE_ON_RESUME, *allowed))


def may_go_on(old: dict, new: dict, allowed: Iterable[str] = ()) -> bool:
    """Whether the run of the saved configuration may go on with one that is not built yet."""
    return not _without_hashes(compare_configs(old, new, allowed)).refused


def compare_arms(old: dict, new: dict, allowed: Iterable[str] = ()) -> Changes:
    """The same for the run in the folder of a sweep's arm, and an arm that is not built yet."""
    return _without_hashes(_compare(old, new, FIXED_IN_A_SWEEP, (*FREE_IN_A_SWEEP, *allowed)))


def arm_digest(config: dict) -> str:
    """The same for two arms that train the same: a hash of what must agree in a sweep."""
    leaves = []
    for key, value in sorted(flat_leaves(config).items()):
        if is_below(key, FIXED_IN_A_SWEEP) and not is_below(key, FREE_IN_A_SWEEP):
            leaves.append([key, value])
    return hashlib.sha256(json.dumps(leaves).encode()).hexdigest()


def _without_hashes(changes: Changes) -> Changes:
    """Of a run and a configuration that is not built yet: nobody knows its hashes, nor what it
    leaves to the data.
    """
    refused = {}
    for key, pair in changes.refused.items():
        if not is_hash(key) and not (key in LEFT_TO_THE_DATA and pair[1] is None):
            refused[key] = pair
    return Changes(changes.changed, refused)


def _is_same_place(old: Any, new: Any) -> bool:
    """Earlier versions wrote the path as it was typed."""
    return isinstance(old, str) and isinstance(new, str) and os.path.abspath(old) == new


def _compare(old: dict, new: dict, fixed: Iterable[str], free: Iterable[str]) -> Changes:
    before = dict(flat(old))
    after = dict(flat(new))
    changed = {}
    refused = {}
    for key in sorted(before.keys() | after.keys()):
        pair = (before.get(key), after.get(key))
        is_leaf = not isinstance(after.get(key, before.get(key)), dict)
        if not is_leaf or pair[0] == pair[1] or key == "data.path" and _is_same_place(*pair):
            continue
        if is_hash(key) and pair[0] is None:
            continue  # the old one comes from a version that took no hash
        changed[key] = pair
        if is_below(key, fixed) and not is_below(key, free):
            refused[key] = pair
    return Changes(changed, refused)


def listed(changes: dict[str, tuple[Any, Any]]) -> str:
    """ "key: old -> new" of each, in one line."""
    return ", ".join(f"{key}: {old} -> {new}" for key, (old, new) in changes.items())


def refuse_different_ranks(configs: list[str]) -> None:
    """Raises UserError where the yaml of a rank differs from that of rank 0, the first; DataError
    where only the data differ.
    """
    first, *others = (OmegaConf.to_container(OmegaConf.create(config)) for config in configs)
    for rank, other in enumerate(others, 1):
        changed = compare_configs(first, other).changed
        if not changed:
            continue
        only_data = all(is_below(key, ["data"]) for key in changed)
        kind = DataError if only_data else UserError
        raise kind(
            f"Rank {rank} has another configuration than rank 0 ({listed(changed)})",
            key=next(iter(changed)),
            remedy="Give all ranks the same command, data and sdtrain.",
        )
