"""What a run has left behind, read back by the tests: not by the code that wrote it. And words
and values of its configuration."""

import copy
import json
from pathlib import Path

import torch
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from safetensors.torch import load_file
from torch import Tensor

from sdtrain.config.overrides import prepare_arguments
from sdtrain.paths import config_dir

SMALL = [
    "model.unet.block_channels=[16,16]",
    "model.unet.norm_groups=8",
    "model.unet.head_dim=8",
    "model.conditioner.context_dim=16",
    "model.conditioner.layers=1",
]
"""A network of a few thousand weights."""

BARE = ["callbacks=none", "validation=none"]
"""Of a run that nobody looks at."""


def not_json(constant: str):
    raise ValueError(f"{constant} is no JSON")


def lines(run: Path) -> list[dict]:
    """The lines of metrics.jsonl. Raises where one holds NaN or infinity, which JSON does not
    have."""
    texts = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(text, parse_constant=not_json) for text in texts]


def numbers(run: Path) -> list[dict]:
    """The lines of metrics.jsonl, without clocks."""
    found = []
    for line in lines(run):
        clocks = [key for key in line if key.endswith(("seconds", "per_second"))]
        found.append({key: value for key, value in line.items() if key not in clocks})
    return found


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


def checkpoints(run: Path) -> list[Path]:
    """The folders of its checkpoints, oldest first."""
    return sorted((run / "checkpoints").glob("[0-9]*[0-9]"))


def newest(run: Path) -> Path:
    return checkpoints(run)[-1]


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by name: weights, average, and the optimizer's moments."""
    found = {}
    for name in ("model", "ema"):
        file = checkpoint / f"{name}.safetensors"
        weights = load_file(file) if file.is_file() else {}
        found |= {f"{name}/{key}": value for key, value in weights.items()}
    state = torch.load(checkpoint / "trainer.pt", weights_only=True)
    for number, moments in state["optimizer_states"][0]["state"].items():
        found |= named_tensors(moments, f"optimizer/{number}/")
    return found


def named_tensors(state: dict, prefix: str) -> dict[str, Tensor]:
    """Every entry of a state, which may hold states, by name; a number as a tensor."""
    found = {}
    for key, value in state.items():
        if isinstance(value, dict):
            found |= named_tensors(value, f"{prefix}{key}/")
        else:
            found[f"{prefix}{key}"] = torch.as_tensor(value)
    return found


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Whether both hold the same tensors, bit for bit."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def finite(values: dict[str, Tensor]) -> bool:
    return all(bool(value.isfinite().all()) for value in values.values())


def flattened(values: dict[str, Tensor]) -> Tensor:
    """The weights among the tensors of a checkpoint, as one vector in float64."""
    weights = [value for name, value in values.items() if name.startswith("model/")]
    return torch.cat([value.double().flatten() for value in weights])


def unfinished_by(words: list[str]) -> Path | None:
    """The run below the working directory that resume=auto would go on with."""
    from sdtrain.config.compose import compose_config
    from sdtrain.config.precheck import precheck_config
    from sdtrain.training.resume import newest_unfinished

    return newest_unfinished(precheck_config(compose_config("train", words), words))


def with_values(config: dict, *words: str) -> dict:
    """A copy of a composed configuration with the plain values of KEY=VALUE. For keys that it has,
    and to which no other key refers: what Hydra would compose, without asking it again.
    +KEY=VALUE is for a key that it does not have, and ~KEY removes one."""
    config = copy.deepcopy(config)
    for word in words:
        (prepared,) = prepare_arguments([word])
        override = OverridesParser.create().parse_override(prepared)
        *parents, name = override.get_key_element().lstrip("+~").split(".")
        node = config
        for parent in parents:
            node = node[parent]
        assert (name in node) is not word.startswith("+"), word
        if word.startswith("~"):
            del node[name]
        else:
            node[name] = override.value()
    return config


def with_model_values(config: dict, *words: str) -> dict:
    """with_values(...), for values of SMALL too, to one of which another key refers."""
    config = with_values(config, *words)
    parts = config["model"]
    if parts.get("conditioner") and "context_dim" in parts.get("unet", {}):
        parts["unet"]["context_dim"] = parts["conditioner"]["context_dim"]
    return config


def with_option(config: dict, word: str) -> dict:
    """A copy of a composed configuration with the option of GROUP=NAME: what Hydra would compose of
    a yaml that is one node, without asking it again."""
    group, _, name = word.partition("=")
    text = (config_dir() / group / f"{name}.yaml").read_text()
    assert not any(sign in text for sign in ("defaults:", "@package", "${")), word
    return copy.deepcopy(config) | {group: yaml.safe_load(text)}
