"""What a training process is told by, and tells, the libraries and launchers around it."""

import logging
import os
import warnings

from lightning.pytorch.utilities import rank_zero_only

from sdtrain.errors import UserError

LAUNCHER_VARIABLES = (
    "TORCHELASTIC_RUN_ID",
    "WORLD_SIZE",
    "RANK",
    "LOCAL_RANK",
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
)

ADVICE_THAT_DOES_NOT_APPLY = (
    ".*does not have many workers.*",
    ".*isinstance\\(treespec, LeafSpec\\).*",
    ".*barrier\\(\\): using the device.*",
    ".*litlogger.*",
    ".*module\\(s\\) in eval mode.*",  # frozen parts are
)


def quiet_libraries() -> None:
    """Silences Lightning's and torch's advice that does not apply here."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for message in ADVICE_THAT_DOES_NOT_APPLY:
        warnings.filterwarnings("ignore", message)


def forget_launcher() -> None:
    """One process is rank 0 of itself, whatever the scheduler that has started it calls it: else a
    second would not see the lock. Raises UserError where torchrun has started several.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    if "TORCHELASTIC_RUN_ID" in os.environ and world != "1":
        raise UserError(
            f"strategy=single is one process, and torchrun has started {world}",
            key="strategy",
            remedy=f"Set strategy=ddp trainer.devices={world}, or start one.",
        )
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    rank_zero_only.rank = 0
