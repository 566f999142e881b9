"""The settings under hydra.launcher: how many arms run at once, and where. Needs no torch."""

import shlex
import shutil
from dataclasses import dataclass

from sdtrain.config.check import check_value
from sdtrain.errors import UserError


@dataclass(frozen=True, kw_only=True)
class LauncherSettings:
    """The config section hydra.launcher.

    Args:
        parallel: number of arms that run at once. None: one per available device (or group of
            trainer.devices of them), one on a machine without any, all arms if there is a prefix.
        devices: the CUDA_VISIBLE_DEVICES of each parallel arm, such as ["0,1", "2,3"]. None
            divides up the devices of this machine.
        prefix: words put before the command of each arm, such as "srun --gpus=1" or
            "ssh -tt host". The cluster's scheduler then decides where the arm runs; it has to
            see the same files.
    """

    parallel: int | None = None
    devices: list[str | int] | None = None
    prefix: str = ""

    def check(self) -> None:
        """Raise UserError for settings that Hydra itself accepts but that cannot work."""
        check_value(self.parallel, int | None, "hydra.launcher.parallel")
        check_value(self.devices, list[str | int] | None, "hydra.launcher.devices")
        check_value(self.prefix, str, "hydra.launcher.prefix")
        if self.parallel is not None and self.parallel < 1:
            raise UserError(
                "would let no arm run",
                key="hydra.launcher.parallel",
                value=self.parallel,
                remedy="Set it to 1 or more.",
            )
        self._check_prefix()

    def _check_prefix(self) -> None:
        key = "hydra.launcher.prefix"
        try:
            words = shlex.split(self.prefix)
        except ValueError as error:
            raise UserError(
                f"cannot be split into words: {error}",
                key=key,
                value=self.prefix,
                remedy=f"Change {key}.",
            ) from error
        if words and shutil.which(words[0]) is None:
            raise UserError(
                f"{key}={self.prefix}: there is no command '{words[0]}' on this machine",
                key=key,
                remedy=f"Change {key}.",
            )
