"""A mixture of Gaussians: a distribution whose optimal denoiser is known in closed form.

Samplers and objectives are tested against it.
"""

import math

import torch
from torch import Tensor


class GaussianMixture:
    """p0 = sum_k w_k N(mu_k, s_k^2 I).

    Args:
        means: [K, D]. Computations use their dtype.
        stds: [K]; 0 makes a mode a single point.
        weights: [K], positive; they are normalised to a sum of 1.
    """

    def __init__(self, means: Tensor, stds: Tensor, weights: Tensor) -> None:
        self.means = means
        self.stds = stds
        self.weights = weights / weights.sum()

    @classmethod
    def ring(cls, modes: int = 6, radius: float = 1.2, std: float = 0.2) -> "GaussianMixture":
        """Return `modes` Gaussians on a circle in the plane, with unequal weights, float64."""
        angle = torch.arange(modes, dtype=torch.float64) * (2 * math.pi / modes)
        weights = 1 + (torch.arange(modes, dtype=torch.float64) % 3)
        return cls(
            radius * torch.stack([angle.cos(), angle.sin()], 1),
            torch.full((modes,), std, dtype=torch.float64),
            weights,
        )

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw samples of p0: [count, D]."""
        mode = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[mode] + self.stds[mode, None] * noise

    def _modes(
        self, x: Tensor, alpha: Tensor, sigma: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return (alpha, sigma, v, offset, responsibility) at this noise level.

        alpha and sigma [B, 1]; v [B, K], the variance of each mode; offset [B, K, D], x - alpha mu;
        responsibility [B, K], the posterior probability r of each mode given x.
        """
        flat = x.flatten(1)
        alpha = alpha.reshape(-1, 1)
        sigma = sigma.reshape(-1, 1)
        v = alpha**2 * self.stds**2 + sigma**2
        offset = flat[:, None] - alpha[..., None] * self.means
        responsibility = (
            self.weights.log() - offset.square().sum(2) / (2 * v) - flat.shape[1] / 2 * v.log()
        ).softmax(1)
        return alpha, sigma, v, offset, responsibility

    def epsilon(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[eps | x] = sigma sum_k r_k (x - alpha mu_k) / v_k: -sigma times the score of p_t.

        With v_k = alpha^2 s_k^2 + sigma^2 and
        r = softmax_k(ln w_k - |x - alpha mu_k|^2 / (2 v_k) - D / 2 ln v_k).

        x [B, D] or [B, D, 1, ...]; alpha and sigma [B, 1, 1, 1] or scalars. Returns the shape of x.
        """
        alpha, sigma, v, offset, responsibility = self._modes(x, alpha, sigma)
        return (sigma * (responsibility[..., None] * offset / v[..., None]).sum(1)).reshape(x.shape)

    def x0(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x] = sum_k r_k (mu_k + alpha s_k^2 / v_k (x - alpha mu_k)), at alpha = 0 too.

        Shapes as in `epsilon`.
        """
        alpha, sigma, v, offset, responsibility = self._modes(x, alpha, sigma)
        mode_x0 = self.means + (alpha * self.stds**2 / v)[..., None] * offset
        return (responsibility[..., None] * mode_x0).sum(1).reshape(x.shape)
