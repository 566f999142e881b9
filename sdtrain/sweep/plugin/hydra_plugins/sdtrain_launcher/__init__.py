"""hydra/launcher=process: Hydra's multirun with each arm of a sweep in a fresh process.

Hydra imports this module whenever one of its programs starts: the rest of sdtrain is imported when
a sweep does. It takes only classes that are defined here.
"""

import atexit
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf


class ProcessLauncher(Launcher):
    """Runs each arm by the command sdtrain, and goes on with what was stopped.

    Args: see sdtrain.sweep.places.Places.
    """

    def __init__(
        self, *, parallel: int | None = None, devices: list[str] | None = None, prefix: str = ""
    ) -> None:
        self.parallel = parallel
        self.devices = OmegaConf.to_container(devices) if OmegaConf.is_config(devices) else devices
        self.prefix = prefix

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        from sdtrain.runs.layout import SweepFolder
        from sdtrain.sweep.record import remove_traces

        self.context = hydra_context
        self.config = config
        folder = Path(config.hydra.sweep.dir).absolute()
        atexit.register(remove_traces, SweepFolder(folder))

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Trains one arm for each list of words.

        Raises UserError before the first starts, SystemExit where not all of them have finished.
        """
        from sdtrain.sweep.draft import draft_sweep
        from sdtrain.sweep.places import Places

        places = Places(parallel=self.parallel, devices=self.devices, prefix=self.prefix)
        sweep = draft_sweep(self.config, job_overrides, initial_job_idx, self._composed, places)

        from sdtrain.sweep.launcher import run_sweep  # imports torch, which no refusal waits for

        returned = []
        for arm in run_sweep(sweep):
            job = JobReturn(overrides=arm.words, working_dir=str(arm.run.path))
            job.cfg = OmegaConf.create(arm.config)
            job.status = JobStatus.COMPLETED
            job.return_value = arm.bits_per_dimension()  # for sweepers that look for the best
            returned.append(job)
        return returned

    def _composed(self, words: list[str]) -> dict:
        """The configuration of one arm, resolved, without Hydra's own node."""
        from sdtrain.config.compose import composition_words, resolved

        config = self.context.config_loader.load_sweep_config(self.config, list(words))
        keys = [key for key in config if key != "hydra"]
        composition = composition_words(self.config.hydra)
        return resolved(OmegaConf.masked_copy(config, keys), words, composition)


ConfigStore.instance().store(
    group="hydra/launcher",
    name="process",
    node={
        "_target_": f"{__name__}.ProcessLauncher",
        "parallel": None,
        "devices": None,
        "prefix": "",
    },
)
