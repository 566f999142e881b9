"""P2 weighting of the loss."""

from torch import Tensor

from sdtrain.errors import UserError


class P2:
    """w = 1 / (k + SNR)^gamma (Choi et al. 2022, eq. 8).

    It gives less weight to low noise levels, where only imperceptible detail is learned.
    """

    def __init__(self, *, gamma: float = 1.0, k: float = 1.0) -> None:
        if not gamma >= 0:
            raise UserError("must be at least 0", key="weighting.gamma", value=gamma)
        if not k > 0:
            raise UserError("must be above 0", key="weighting.k", value=k)
        self.gamma = gamma
        self.k = k

    def __call__(self, log_snr: Tensor, jacobian: Tensor) -> Tensor:
        return (self.k + log_snr.exp()) ** -self.gamma
