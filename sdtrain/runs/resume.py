"""What a run may go on with: the configuration and the weights of its checkpoint, and the configurations of its ranks, beside its own."""

from collections.abc import Iterable
from pathlib import Path

import torch
from omegaconf import OmegaConf

from sdtrain.config.check import flat
from sdtrain.errors import DataError, UserError
from sdtrain.runs.checkpoint import read_config, read_weights

FIXED_ON_RESUME = (  # another value would be another run
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
FREE_ON_RESUME = (
    "data.num_workers",
    "data.on_error",
    "data.max_skipped",
)  # of these, keys that make none


def below(key: str, prefixes: Iterable[str]) -> bool:
    """Whether the key is one of the prefixes, or lies below one."""
    return any(f"{key}.".startswith(f"{prefix}.") for prefix in prefixes)


def changes(
    old: dict, new: dict, allowed: Iterable[str] = ()
) -> tuple[dict[str, tuple], dict[str, tuple]]:
    """({key: (old, new)} of all leaves that differ, those of them that a run cannot be gone on with unless they are allowed)."""
    before, after = dict(flat(old)), dict(flat(new))
    leaves = [
        key
        for key in sorted(before.keys() | after.keys())
        if not isinstance(after.get(key, before.get(key)), dict)
    ]
    changed = {
        key: (before.get(key), after.get(key))
        for key in leaves
        if before.get(key) != after.get(key)
    }
    return changed, {
        key: pair
        for key, pair in changed.items()
        if below(key, FIXED_ON_RESUME) and not below(key, (*FREE_ON_RESUME, *allowed))
    }


def check_weights(checkpoint: Path, module: torch.nn.Module) -> None:
    """Raises UserError where a model that was allowed to change does not fit the weights."""
    old, new = (
        {name: list(value.shape) for name, value in each.items()}
        for each in (read_weights(checkpoint, "model"), module.state_dict())
    )
    if odd := [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]:
        shapes = (
            f"{odd[0]} is {old.get(odd[0], 'missing')} there and {new.get(odd[0], 'missing')} here"
        )
        raise UserError(
            f"The weights of {checkpoint} do not fit the changed model: {shapes}. Set model back, or choose another hydra.run.dir."
        )


def applied_changes(
    checkpoint: Path, config: dict, module: torch.nn.Module, allowed: list[str]
) -> list[str]:
    """A line for each key that differs from the checkpoint's. Raises UserError where one of them would make it another run, and is not allowed."""
    changed, refused = changes(read_config(checkpoint), config, allowed)
    if refused:
        lines = ", ".join(f"{key}: {old} -> {new}" for key, (old, new) in refused.items())
        if "data.sha256" in refused:
            what = (
                "the pictures or captions in data.path"
                if "path" in config["data"]
                else "the emoji of data.font"
            )
            lines += f"; data.sha256: {what} changed since the run began"
        groups = ",".join(dict.fromkeys([*allowed, *(key.partition(".")[0] for key in refused)]))
        raise UserError(
            f"The run in {checkpoint.parent.parent} cannot go on with another configuration ({lines}). Set them back, choose another hydra.run.dir, "
            f"or allow it with resume_allow=[{groups}]."
        )
    if any(below(key, ["model"]) for key in changed):
        check_weights(checkpoint, module)
    return [
        f"changed since the checkpoint: {key}: {old} -> {new}"
        for key, (old, new) in changed.items()
    ]


def refuse_if_different(configs: list[str]) -> None:
    """Raises UserError where the yaml of a rank is not that of rank 0, the first; DataError where only the data differ."""
    first, *others = (OmegaConf.to_container(OmegaConf.create(config)) for config in configs)
    for rank, other in enumerate(others, 1):
        if changed := changes(first, other)[0]:
            lines = ", ".join(
                f"{key}: {ours} -> {theirs}" for key, (ours, theirs) in changed.items()
            )
            kind = DataError if all(below(key, ["data"]) for key in changed) else UserError
            raise kind(
                f"Rank {rank} has another configuration than rank 0 ({lines}). Give all ranks the same command, data and sdtrain."
            )
