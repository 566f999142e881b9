"""Settings of Lightning and torch that hold for the whole training process."""

import logging
import warnings

from lightning.pytorch.utilities import rank_zero_only

from sdtrain.console import global_rank

ADVICE_THAT_DOES_NOT_APPLY = (
    ".*does not have many workers.*",
    ".*isinstance\\(treespec, LeafSpec\\).*",
    ".*barrier\\(\\): using the device.*",
    ".*litlogger.*",
    ".*module\\(s\\) in eval mode.*",  # frozen parts are meant to be
)


def quiet_libraries() -> None:
    """Silence advice of Lightning and torch that does not apply here."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for message in ADVICE_THAT_DOES_NOT_APPLY:
        warnings.filterwarnings("ignore", message)


def set_lightning_rank() -> None:
    """Set the rank that Lightning uses for this process to sdtrain's, whatever launcher Lightning
    has detected.
    """
    rank_zero_only.rank = global_rank()
