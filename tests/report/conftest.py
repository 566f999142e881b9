"""Runs whose numbers are made here, and the command that compares them."""

import json

import pytest
import torch
import yaml

from sdtrain.evaluation.noise_level_error import BITS, LEVELS
from sdtrain.report.compare import compare
from sdtrain.report.page import render_markdown
from sdtrain.report.ranking import summary_lines
from sdtrain.report.record import read_validations
from sdtrain.runs.layout import RunFolder
from sdtrain.runs.reader import find_runs

CONFIG = {
    "name": "shapes",
    "seed": 0,
    "model": {"autoencoder": {"path": "data/shapes_autoencoder"}},
    "optimizer": {"lr": 0.002},
    "schedule": {"_target_": "sdtrain.schedules.scaled_linear.scaled_linear"},
    "modifiers": None,
    "prediction": {"_target_": "sdtrain.diffusion.prediction.Epsilon"},
    "weighting": {"_target_": "sdtrain.diffusion.weighting.simple.Simple"},
    "loss": {"_target_": "sdtrain.diffusion.losses.MSE"},
    "times": {"_target_": "sdtrain.diffusion.times.Uniform"},
    "noise": {"_target_": "sdtrain.diffusion.noise.Gaussian"},
    "grid": {"_target_": "sdtrain.samplers.grids.trailing", "_partial_": True},
}
LINEAR = LEVELS.sigmoid()


def made_errors(count, scale, seed=0, own=0.0):
    """Errors [count, L]: what all runs share of a picture, and `own` of the run itself."""
    shared = torch.randn(count, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed + 1)
    alone = torch.randn(count, len(LEVELS), generator=generator, dtype=torch.float64)
    return LINEAR * (0.5 * scale * (1 + 0.3 * shared + own * alone))


@pytest.fixture(scope="session")
def errors():
    return made_errors


@pytest.fixture
def write(tmp_path):
    """write(name, errors, ...) -> the folder of a run that has left just that."""

    def made(
        name,
        found,
        *,
        state="finished",
        inside=(-6, 7),
        looks=(100, 200),
        config=None,
        pictures=None,
        **latents,
    ):
        folder = tmp_path / "sweep" / name
        run = RunFolder(folder)
        run.validation.mkdir(parents=True)
        run.config.write_text(yaml.safe_dump(CONFIG | (config or {})))
        exit_code = 0 if state == "finished" else 4
        status = {"state": state, "exit_code": exit_code, "images_seen": looks[-1]}
        run.status.write_text(json.dumps(status))
        reached = (LEVELS >= inside[0]) & (LEVELS <= inside[1])
        lines = []
        for number, seen in enumerate(looks):
            worse = torch.where(reached, found * (1 + 0.1 * (len(looks) - 1 - number)), LINEAR)
            names = pictures or [f"p{i}" for i in range(len(found))]
            record = _record(seen, reached, names, worse) | latents
            (run.validation / f"{seen:012d}.json").write_text(json.dumps(record))
            loss = {"train/loss": 1 / seen, "train/images_per_second": 50.0}
            bits = {"validation/bits_per_dim": (worse.mean(0) @ BITS).item()}
            lines.append({"images_seen": seen, "seconds": 10.0} | loss)
            lines.append({"images_seen": seen, "seconds": 11.0} | bits)
        run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return made


def _record(seen, reached, names, found):
    return {
        "images_seen": seen,
        "log_snr": LEVELS.tolist(),
        "inside": reached.tolist(),
        "pictures": names,
        "autoencoder": "a" * 64,
        "latent_scale": 0.9,
        "mean": [0.0],
        "variance": [1.0],
        "linear": LINEAR.expand(len(found), -1).tolist(),
        "errors": {"ema": found.tolist(), "raw": found.tolist()},
    }


@pytest.fixture(scope="session")
def read():
    """read(FOLDER, ...) -> the runs in these folders."""

    def run(*folders):
        return read_validations(find_runs(list(folders)))

    return run


@pytest.fixture(scope="session")
def summary_of(read):
    """summary_of(FOLDER, ...) -> the lines that sdtrain-report prints of the runs in them."""

    def lines(*folders, baseline=None):
        return summary_lines(compare(read(*folders), baseline))

    return lines


@pytest.fixture(scope="session")
def text_of():
    """text_of(SECTION, ...) -> what the report says there, in Markdown."""

    def text(*sections):
        return render_markdown("", list(sections))

    return text


@pytest.fixture
def report(here):
    """report(FOLDER, ...) -> what the command prints."""

    def run(*words):
        result = here("sdtrain-report", *map(str, words))
        assert result.code == 0, result.err
        return result.out

    return run
