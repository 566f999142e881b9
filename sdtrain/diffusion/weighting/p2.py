"""P2 weights."""

from torch import Tensor


class P2:
    """w = 1 / (k + SNR)^gamma: less to the low noise levels, where only imperceptible detail is learned (Choi et al. 2022, eq. 8)."""

    def __init__(self, *, gamma: float = 1.0, k: float = 1.0) -> None:
        if not gamma >= 0 or not k > 0:
            raise ValueError(
                f"weighting.gamma={gamma:g} must be at least 0, and weighting.k={k:g} above 0."
            )
        self.gamma, self.k = gamma, k

    def __call__(self, log_snr: Tensor, jacobian: Tensor) -> Tensor:
        return (self.k + log_snr.exp()) ** -self.gamma
