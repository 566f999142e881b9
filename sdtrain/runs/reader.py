"""What a run has left behind, read for comparison. Nothing of it is built or imported."""

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sdtrain.errors import UserError
from sdtrain.evaluation.noise_level_error import LEVELS, NoiseLevelErrors


@dataclass
class Validation:
    """One look: errors by picture and level, and what they were taken on."""

    images_seen: int
    found: NoiseLevelErrors
    pictures: list[str]
    latents: dict[str, Any]
    weights: str  # "averaged", or "raw" of a run that keeps no average

    def same_ground(self, other: "Validation") -> str | None:
        """Why its numbers mean something else than the other's, or None."""
        for key, name in (
            ("autoencoder", "another autoencoder"),
            ("latent_scale", "another latent scale"),
        ):
            if self.latents[key] != other.latents[key]:
                return name
        for key in ("mean", "variance"):
            mine, theirs = self.latents[key], other.latents[key]
            if mine.shape != theirs.shape or not torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5):
                return "latents of another mean or variance: other training pictures"
        count = min(len(self.pictures), len(other.pictures))
        return (
            None if self.pictures[:count] == other.pictures[:count] else "other validation pictures"
        )


@dataclass
class RunRecord:
    """A run's folder. state: as in status.json, or "unknown"; lines: of metrics.jsonl, those that can be read."""

    name: str
    folder: Path
    config: dict
    state: str
    exit_code: int | None
    images_seen: int
    peak_memory_mb: float | None = None
    lines: list[dict] = field(default_factory=list)
    validations: list[Validation] = field(default_factory=list)

    @property
    def last(self) -> Validation | None:
        return self.validations[-1] if self.validations else None

    def series(self, key: str) -> tuple[list[int], list[float], list[float]]:
        """(images seen, seconds, values) of the lines that have the key."""
        rows = [
            (line["images_seen"], line["seconds"], line[key])
            for line in self.lines
            if isinstance(line.get(key), int | float)
        ]
        return tuple(map(list, zip(*rows, strict=True))) if rows else ([], [], [])

    @property
    def speed(self) -> float | None:
        """Median images a second."""
        values = self.series("train/images_per_second")[2]
        return sorted(values)[len(values) // 2] if values else None

    @property
    def evaluation(self) -> dict:
        return read_evaluation(self.folder / "evaluation")


def read_evaluation(folder: Path) -> dict:
    """What sdtrain-evaluate has left there, or nothing."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((folder / "evaluation.json").read_text())
        return found if isinstance(found, dict) else {}
    return {}


def find_runs(folders: list[Path]) -> list[RunRecord]:
    """The runs in these folders, each a run or a sweep. Raises UserError where there is none."""
    found = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder. Give the folder of a run or of a sweep.")
        if (folder / "config.yaml").is_file():
            found.append((folder.resolve().name, folder))
            continue
        arms = sweep_arms(folder) or sorted(
            path.parent
            for path in folder.glob("*/config.yaml")
            if path.parent.name != "first_stage"
        )
        if not arms:
            raise UserError(
                f"{folder} holds no runs: a run has a config.yaml, a sweep has runs in it. Give the folder that `sdtrain` has written."
            )
        found += [(arm.name, arm) for arm in arms]
    named = {folder.resolve(): printable(name) for name, folder in found}  # each once
    parts = 1
    while len(set(named.values())) < len(
        named
    ):  # of several folders: as much of the path as it takes
        parts += 1
        named = {folder: printable("/".join(folder.parts[-parts:])) for folder in named}
    return [read_run(name, folder) for folder, name in named.items()]


def printable(name: str) -> str:
    """A folder may be called by bytes that are no text."""
    return name.encode(errors="replace").decode()


def sweep_arms(folder: Path) -> list[Path] | None:
    """A sweep's arms in its own order, those that have never begun among them; None where the folder is no sweep's."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return [folder / name for name in json.loads((folder / "sweep.json").read_text())["arms"]]
    return None


def read_run(name: str, folder: Path) -> RunRecord:
    status, config = {}, {}
    with contextlib.suppress(OSError, ValueError, TypeError):
        status = dict(json.loads((folder / "status.json").read_text()))
    with contextlib.suppress(OSError, ValueError, TypeError, YAMLError, OmegaConfBaseException):
        config = dict(OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")))
    state = str(status.get("state", "unknown"))
    if not config and (folder / "config.yaml").exists():
        state = "with a config.yaml that cannot be read"
    elif not config and state in (
        "unknown",
        "finished",
    ):  # one that was refused as it was built has failed
        state = "not begun"
    code, seen, memory = (
        status.get(key) if isinstance(status.get(key), int | float) else None
        for key in ("exit_code", "images_seen", "peak_memory_mb")
    )
    run = RunRecord(name, folder, config, state, code, seen or 0, memory)
    run.lines = _lines(folder / "metrics.jsonl")
    if run.lines and state == "running":
        run.images_seen = run.lines[-1]["images_seen"]
    for path in sorted((folder / "validation").glob("*.json")):
        with contextlib.suppress(
            OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError
        ):
            read = _validation(json.loads(path.read_text()))
            if read is not None and (
                state != "finished" or read.images_seen <= run.images_seen
            ):  # else of an earlier process, which went further
                run.validations.append(read)
    return run


def _lines(path: Path) -> list[dict]:
    found = []
    with contextlib.suppress(OSError):
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError):
                line = json.loads(text)
                found.append(
                    line
                    | {"seconds": float(line["seconds"]), "images_seen": int(line["images_seen"])}
                )
    return found


def _validation(record: dict) -> Validation | None:
    """None of another version's levels, and of what is not whole."""
    if record["log_snr"] != LEVELS.tolist():
        return None
    weights = "ema" if record["errors"].get("ema") else "raw"
    errors, linear = (
        torch.tensor(rows, dtype=torch.float64)
        for rows in (record["errors"][weights], record["linear"])
    )
    found = NoiseLevelErrors(errors, linear, torch.tensor(record["inside"]))
    if (
        not errors.shape == linear.shape == (len(record["pictures"]), len(LEVELS))
        or found.inside.shape != LEVELS.shape
    ):
        return None
    latents = {key: record[key] for key in ("autoencoder", "latent_scale")} | {
        key: torch.tensor(record[key]) for key in ("mean", "variance")
    }
    return Validation(
        record["images_seen"],
        found,
        record["pictures"],
        latents,
        "averaged" if weights == "ema" else "raw",
    )


def flat(node: dict, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested dicts by dotted key."""
    found = {}
    for key, value in node.items():
        found |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        )
    return found


def differences(runs: list[RunRecord]) -> dict[str, list[Any]]:
    """{key: its value in each run, "" where it has no such key} for what is not the same in all."""
    leaves = [flat(run.config) for run in runs]
    keys = dict.fromkeys(key for each in leaves for key in each)
    return {
        key: [each.get(key, "") for each in leaves]
        for key in keys
        if len({json.dumps(each.get(key, "")) for each in leaves}) > 1
    }
