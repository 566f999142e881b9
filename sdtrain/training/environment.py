"""What a training process is told by, and tells, the libraries and launchers around it."""

import logging
import warnings

from lightning.pytorch.utilities import rank_zero_only

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


def be_rank_zero() -> None:
    """Tells Lightning that this process is alone, whatever launcher it has found."""
    rank_zero_only.rank = 0
