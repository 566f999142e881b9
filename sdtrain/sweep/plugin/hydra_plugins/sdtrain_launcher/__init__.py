"""hydra/launcher=process: Hydra's multirun with a new process for each arm of a sweep.

Hydra imports this module whenever any Hydra program starts, so the rest of sdtrain is imported only
when a sweep starts. Hydra accepts only launcher classes that are defined in this module itself.
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
    """Runs each arm with the command sdtrain, and resumes arms that were stopped.

    Args: see sdtrain.sweep.launcher_settings.LauncherSettings.
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
        """Train one arm for each list of overrides.

        Raises UserError before the first one starts, and SystemExit if not all of them finish.
        """
        from sdtrain.sweep.launcher_settings import LauncherSettings
        from sdtrain.sweep.precheck import precheck_sweep

        launcher = LauncherSettings(
            parallel=self.parallel, devices=self.devices, prefix=self.prefix
        )
        sweep = precheck_sweep(
            self.config, job_overrides, initial_job_idx, self._compose_arm, launcher
        )

        from sdtrain.sweep.launcher import run_sweep  # imports torch, too slow for the checks above

        returned = []
        for arm in run_sweep(sweep):
            job = JobReturn(overrides=arm.arguments, working_dir=str(arm.run.path))
            job.cfg = OmegaConf.create(arm.config)
            job.status = JobStatus.COMPLETED
            job.return_value = arm.bits_per_dimension()  # for sweepers that optimize a value
            returned.append(job)
        return returned

    def _compose_arm(self, overrides: list[str]) -> dict:
        """Return the resolve_config configuration of one arm, without Hydra's own node."""
        from sdtrain.config.compose import composition_arguments, resolve_config

        config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
        keys = [key for key in config if key != "hydra"]
        composition = composition_arguments(self.config.hydra)
        return resolve_config(OmegaConf.masked_copy(config, keys), overrides, composition)


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
