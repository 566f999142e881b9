"""Sweeps that are checked and run without a command line."""

import copy
import functools
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from sdtrain.config.compose import PRIMARY
from sdtrain.sweep.launcher_settings import LauncherSettings
from sdtrain.sweep.precheck import PrecheckedSweep, precheck_sweep


def prechecked(compose, folder: Path, jobs: list[list[str]], **launcher) -> PrecheckedSweep:
    node = {
        "job": {"config_name": PRIMARY},
        "runtime": {"config_sources": [], "choices": {"sweep": "none"}},
        "overrides": {"hydra": []},
        "sweep": {"dir": str(folder)},
        "sweeper": {"params": {}},
    }
    config = OmegaConf.create({"hydra": node})
    return precheck_sweep(config, jobs, 0, compose, LauncherSettings(**launcher))


@pytest.fixture(scope="session")
def precheck(composed, tiny):
    """precheck(FOLDER, "schedule=linear seed=1", ..., prefix=...) -> the sweep of these arms, as
    run_sweep takes it."""

    @functools.cache
    def composed_once(words: tuple[str, ...]) -> dict:
        return composed(*words)

    def compose(words: list[str]) -> dict:
        """A seed is no reason to compose again."""
        seeds = [word for word in words if word.startswith("seed=")]
        others = [word for word in words if word not in seeds]
        config = copy.deepcopy(composed_once(tuple(others)))
        for word in seeds:
            config["seed"] = int(word.removeprefix("seed="))
        return config

    def made(folder: Path, *arms: str, **launcher) -> PrecheckedSweep:
        jobs = [tiny(*arm.split()) for arm in arms]
        return prechecked(compose, folder, jobs, **launcher)

    return made
