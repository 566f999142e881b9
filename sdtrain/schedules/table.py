"""Schedules made of a table: T betas, or the cumulative products of 1 - beta."""

import json
import re
from pathlib import Path

import torch
from torch import Tensor

from sdtrain.errors import UserError
from sdtrain.schedules.schedule import Schedule, curve_error


def check_num_timesteps(num_timesteps: int) -> None:
    """Raise UserError for fewer than the 2 points that a table needs."""
    if num_timesteps < 2:
        raise UserError("must be at least 2", key="schedule.num_timesteps", value=num_timesteps)


class InterpolatedTable:
    """log_snr at T points, point i at t = i / (T - 1), interpolated linearly between them.

    Where the last point is -inf, alpha is interpolated in the last interval instead, so that it
    falls to 0 continuously.
    """

    def __init__(self, log_snr: Tensor) -> None:
        self.last = len(log_snr) - 1
        self.ends_in_zero = log_snr[-1].item() == -float("inf")
        self.tables = {torch.device("cpu"): log_snr}

    def table(self, device: torch.device) -> Tensor:
        """Return log_snr at the points, on a device."""
        if device not in self.tables:
            # Cached per device, because a copy in every step would make the GPU wait for the CPU.
            self.tables[device] = self.tables[torch.device("cpu")].to(device)
        return self.tables[device]

    def log_snr(self, t: Tensor) -> Tensor:
        """Return log_snr at times t in [0, 1], float64."""
        table = self.table(t.device)
        position = t * self.last
        low = position.floor().clamp(0, self.last - 1).long()
        start = table[low]
        end = table[low + 1]
        fraction = position - low
        if not self.ends_in_zero:
            return torch.lerp(start, end, fraction)
        alpha = start.sigmoid().sqrt() * (1 - fraction)
        to_zero = 2 * alpha.log() - torch.log1p(-(alpha**2))
        in_last = torch.where(fraction == 0, start, to_zero)
        elsewhere = torch.lerp(start, end.clamp(min=-1e300), fraction)
        return torch.where(low == self.last - 1, in_last, elsewhere)

    def time_of(self, log_snr: Tensor) -> Tensor:
        """Return the time of each log_snr: the inverse of `log_snr`."""
        table = self.table(log_snr.device)
        low = (torch.searchsorted(-table, -log_snr.contiguous()) - 1).clamp(0, self.last - 1)
        start = table[low]
        end = table[low + 1]
        fraction = (log_snr - start) / (end - start)
        if self.ends_in_zero:
            in_last = 1 - ((log_snr.sigmoid() / start.sigmoid()).sqrt())
            fraction = torch.where(low == self.last - 1, in_last, fraction)
        return (low + fraction) / self.last


def from_betas(name: str, betas: Tensor, keys: str) -> Schedule:
    """Return the schedule of alpha_bar_i = prod_{j <= i} (1 - beta_j) (Ho et al. 2020, eq. 4).

    betas: [T], each in (0, 1]. Raises UserError, which names `keys`, for other values.
    """
    betas = _as_vector(name, betas, keys)
    allowed = (betas > 0) & (betas <= 1)
    if not bool(allowed.all()):
        bad = betas[~allowed][0].item()
        problem = f"schedule={name} has a beta of {bad:g}; every beta must lie in (0, 1]"
        raise curve_error(problem, keys)
    # ln(alpha_bar) by log1p and ln(1 - alpha_bar) by expm1, to avoid cancellation where beta or
    # alpha_bar is tiny.
    log_alpha_bar = torch.log1p(-betas).cumsum(0)
    return _schedule(name, log_alpha_bar - torch.log(-torch.expm1(log_alpha_bar)), keys)


def from_alphas_cumprod(name: str, alphas_cumprod: Tensor, keys: str) -> Schedule:
    """Return the schedule of alpha_bar_i = alphas_cumprod[i].

    alphas_cumprod: [T], strictly falling, within [0, 1). Raises UserError, which names `keys`, for
    other values.
    """
    alpha_bar = _as_vector(name, alphas_cumprod, keys)
    in_range = bool(((alpha_bar >= 0) & (alpha_bar < 1)).all())
    if not in_range or not bool((alpha_bar.diff() < 0).all()):
        raise curve_error(
            f"schedule={name}: alphas_cumprod must fall from each timestep to the next, "
            "within [0, 1)",
            keys,
        )
    return _schedule(name, alpha_bar.log() - torch.log1p(-alpha_bar), keys)


def _as_vector(name: str, values: Tensor, keys: str) -> Tensor:
    """Return the values as float64 [T]. Raises UserError for another shape or T < 2."""
    values = torch.as_tensor(values, dtype=torch.float64)
    if values.ndim != 1 or len(values) < 2:
        raise curve_error(
            f"schedule={name} needs at least 2 timesteps in one list, it has {tuple(values.shape)}",
            keys,
        )
    return values


def _schedule(name: str, log_snr: Tensor, keys: str) -> Schedule:
    interpolated = InterpolatedTable(log_snr)
    return Schedule(
        name,
        interpolated.log_snr,
        interpolated.time_of,
        num_timesteps=len(log_snr),
        discrete=True,
        even_timesteps=True,
        keys=keys,
    )


def read_numbers(path: str, key: str) -> list[float]:
    """Return the numbers in a text file: a JSON list, or separated by spaces, commas or lines.

    Raises UserError, which names the key, for a file that cannot be read so.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            words = json.loads(text)
        else:
            words = re.split(r"[\s,;]+", text.strip(" \n\r\t,;"))
        return [float(word) for word in words]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"is not a readable text file of numbers: {error}",
            key=key,
            value=path,
            remedy=f"Set {key} to a list or a file of numbers.",
        ) from error


def table(
    *,
    betas: list[float] | str | None = None,
    alphas_cumprod: list[float] | str | None = None,
    num_timesteps: int = 1000,
) -> Schedule:
    """Return a schedule from the user's own betas or alphas_cumprod, a list or a text file's path.

    num_timesteps: the number of timesteps of the model. Raises UserError for a table of another
    length, because a network trained on 1000 timesteps gives nonsense on a table of 50.
    """
    if (betas is None) == (alphas_cumprod is None):
        raise UserError(
            "schedule=table needs exactly one table",
            key="schedule.betas",
            remedy="Set either schedule.betas or schedule.alphas_cumprod, not both, to a list or a "
            "file of numbers.",
        )
    if betas is not None:
        key = "schedule.betas"
        return from_betas("table", _read_values(betas, key, num_timesteps), key)
    key = "schedule.alphas_cumprod"
    return from_alphas_cumprod("table", _read_values(alphas_cumprod, key, num_timesteps), key)


def _read_values(setting: list[float] | str, key: str, num_timesteps: int) -> Tensor:
    """Return the user's numbers, float64 [num_timesteps]. Raises UserError for another length."""
    numbers = read_numbers(setting, key) if isinstance(setting, str) else setting
    values = torch.tensor(numbers, dtype=torch.float64)
    count = len(values)
    if count < 2:
        raise UserError(f"{key} has {count} timesteps; a table needs at least 2", key=key)
    if count != num_timesteps:
        raise UserError(
            f"{key} has {count} timesteps, but schedule.num_timesteps is {num_timesteps}",
            key=key,
            remedy=f"Give {num_timesteps} numbers, or set schedule.num_timesteps={count}.",
        )
    return values
