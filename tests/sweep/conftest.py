"""Sweeps that are checked and run without a command line."""

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
def precheck(tiny, tiny_config):
    """precheck(FOLDER, "schedule=linear seed=1", ..., prefix=...) -> the sweep of these arms, as
    run_sweep takes it."""

    def compose(words: list[str]) -> dict:
        """Hydra is asked once for the options of an arm; its values are set in what it composed."""
        return tiny_config(*words)

    def made(folder: Path, *arms: str, **launcher) -> PrecheckedSweep:
        jobs = [tiny(*arm.split()) for arm in arms]
        return prechecked(compose, folder, jobs, **launcher)

    return made
