"""A schedule is log_snr as a function of time t in [0, 1]; alpha and sigma are views of it.

    x_t = alpha x0 + sigma eps,  log_snr = ln(alpha^2 / sigma^2),  falling as t rises.
"""

from typing import Protocol

import torch
from torch import Tensor

from sdtrain.errors import UserError


class Schedule(Protocol):
    """What the other rooms may ask of a schedule. Times are float64 tensors of any shape."""

    num_timesteps: int

    def log_snr(self, t: Tensor) -> Tensor: ...

    def time_of(self, log_snr: Tensor) -> Tensor: ...

    def alpha_sigma(self, t: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]: ...

    def timestep(self, t: Tensor) -> Tensor: ...

    def training_time(self, u: Tensor) -> Tensor: ...


def timesteps(number: int) -> int:
    """`number`, if a table can have that many points. UserError where it has less than 2."""
    if number < 2:
        raise UserError(f"schedule.num_timesteps={number} must be at least 2.")
    return number


class TableSchedule:
    """The variance preserving schedule of T betas (Ho et al. 2020, eq. 4): alpha_bar_i = prod_{j<=i} (1 - beta_j).

    Point i lies at t = i / (T - 1). The table is exact there; between the points log_snr is interpolated linearly.

    Args:
        name: said in error messages.
        betas: [T], T >= 2, each in (0, 1). Anything else raises UserError.
        keys: the keys that the betas come from, said in that error.
    """

    def __init__(self, name: str, betas: Tensor, keys: str = "the betas") -> None:
        betas = torch.as_tensor(betas, dtype=torch.float64)
        if betas.ndim != 1 or len(betas) < 2:
            raise UserError(f"schedule={name} needs at least 2 timesteps in one list, it has {tuple(betas.shape)}.")
        if not bool(((betas > 0) & (betas < 1)).all()):
            bad = betas[~((betas > 0) & (betas < 1))][0].item()
            raise UserError(f"schedule={name} has a beta of {bad:g}; every beta lies between 0 and 1, both excluded. Change {keys}.")
        self.name, self.num_timesteps = name, len(betas)
        # ln(alpha_bar) by log1p, and ln(1 - alpha_bar) by expm1: nothing cancels where beta or alpha_bar is tiny.
        log_alpha_bar = torch.log1p(-betas).cumsum(0)
        self._log_snr = {torch.device("cpu"): log_alpha_bar - torch.log(-torch.expm1(log_alpha_bar))}

    def _table(self, device: torch.device) -> Tensor:
        if device not in self._log_snr:  # kept per device: a copy in every step would wait for the host
            self._log_snr[device] = self._log_snr[torch.device("cpu")].to(device)
        return self._log_snr[device]

    def log_snr(self, t: Tensor) -> Tensor:
        """log_snr at times t in [0, 1], same shape, float64."""
        table, place = self._table(t.device), t.double() * (self.num_timesteps - 1)
        low = place.floor().clamp(0, self.num_timesteps - 2).long()
        return torch.lerp(table[low], table[low + 1], place - low)

    def time_of(self, log_snr: Tensor) -> Tensor:
        """The inverse of log_snr, same shape, float64. Raises ValueError outside the schedule's range."""
        table, wanted = self._table(log_snr.device), log_snr.double()
        if bool(((wanted > table[0]) | (wanted < table[-1])).any()):
            raise ValueError(f"log_snr lies outside the schedule's range [{table[-1]:.4f}, {table[0]:.4f}]")
        low = (torch.searchsorted(-table, -wanted.contiguous()) - 1).clamp(0, self.num_timesteps - 2)
        return (low + (wanted - table[low]) / (table[low + 1] - table[low])) / (self.num_timesteps - 1)

    def alpha_sigma(self, t: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at times t [B] or a scalar, each [B, 1, 1, 1]; alpha^2 + sigma^2 = 1.

        Computed in float64: half precision would add no noise at all at the first timesteps.
        """
        log_snr = self.log_snr(t).reshape(-1, 1, 1, 1)
        return log_snr.sigmoid().sqrt().to(dtype), (-log_snr).sigmoid().sqrt().to(dtype)

    def timestep(self, t: Tensor) -> Tensor:
        """What the network is fed for t: t (T - 1), float32."""
        return (t * (self.num_timesteps - 1)).float()

    def training_time(self, u: Tensor) -> Tensor:
        """Uniforms u in [0, 1) to the T points of the table, each equally likely: t = floor(u T) / (T - 1)."""
        return (u * self.num_timesteps).floor() / (self.num_timesteps - 1)
