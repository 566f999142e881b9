"""What a training process is told by, and tells, the libraries and launchers around it."""

import logging
import warnings

from lightning.pytorch.utilities import rank_zero_only

from sdtrain.console import global_rank

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


def tell_rank() -> None:
    """Tells Lightning which rank this process is, whatever launcher it has found."""
    rank_zero_only.rank = global_rank()
