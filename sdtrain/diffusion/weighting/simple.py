"""Weight one on the network's own target."""

from torch import Tensor


class Simple:
    """w = 1 / J: the loss that papers and other trainers call unweighted.

    L_simple of Ho et al. 2020, eq. 14.
    """

    def __call__(self, log_snr: Tensor, jacobian: Tensor) -> Tensor:
        return 1 / jacobian
