"""Where the arms of a sweep run: the settings under hydra.launcher. Without torch."""

import shlex
import shutil
from dataclasses import dataclass

from sdtrain.config.check import check_value
from sdtrain.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Places:
    """hydra.launcher.

    Args:
        parallel: arms at once; None: as many as there are devices for, one where there are none,
            all with a prefix.
        devices: a value of CUDA_VISIBLE_DEVICES for each place, as ["0,1", "2,3"]; None shares out
            what the machine has.
        prefix: words before the command of each arm, as "srun --gpus=1" or "ssh -tt host": a
            cluster's own scheduler places it, on the same files.
    """

    parallel: int | None = None
    devices: list[str | int] | None = None
    prefix: str = ""

    def check(self) -> None:
        """Raises UserError for settings that Hydra itself lets pass."""
        check_value(self.parallel, int | None, "hydra.launcher.parallel")
        check_value(self.devices, list[str | int] | None, "hydra.launcher.devices")
        check_value(self.prefix, str, "hydra.launcher.prefix")
        if self.parallel is not None and self.parallel < 1:
            raise UserError(
                "lets no arm run",
                key="hydra.launcher.parallel",
                value=self.parallel,
                remedy="Give 1 or more.",
            )
        self._check_prefix()

    def _check_prefix(self) -> None:
        key = "hydra.launcher.prefix"
        try:
            words = shlex.split(self.prefix)
        except ValueError as error:
            raise UserError(
                f"cannot be read: {error}", key=key, value=self.prefix, remedy=f"Change {key}."
            ) from error
        if words and shutil.which(words[0]) is None:
            raise UserError(
                f"{key}={self.prefix}: there is no command '{words[0]}' here",
                key=key,
                remedy=f"Change {key}.",
            )
