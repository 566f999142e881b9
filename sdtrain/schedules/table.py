"""Schedules made of a table: T betas, or their cumulative products."""

import json
import re
from pathlib import Path

import torch
from torch import Tensor

from sdtrain.errors import UserError
from sdtrain.schedules.schedule import Schedule, curve_error


def timesteps(number: int) -> int:
    """`number`, if a table can have that many points. Raises UserError below 2."""
    if number < 2:
        raise UserError("must be at least 2", key="schedule.num_timesteps", value=number)
    return number


class Points:
    """log_snr at T points, point i at t = i / (T - 1).

    Exact there, and interpolated linearly between. Where the last point is -inf, alpha is
    interpolated in the last interval, so that it falls to 0 continuously.
    """

    def __init__(self, log_snr: Tensor) -> None:
        self.last = len(log_snr) - 1
        self.ends_in_zero = log_snr[-1].item() == -float("inf")
        self.tables = {torch.device("cpu"): log_snr}

    def table(self, device: torch.device) -> Tensor:
        """log_snr at the points, on a device."""
        if device not in self.tables:
            # Kept per device: a copy in every step would wait for the host.
            self.tables[device] = self.tables[torch.device("cpu")].to(device)
        return self.tables[device]

    def log_snr(self, t: Tensor) -> Tensor:
        """log_snr at times t in [0, 1], float64."""
        table = self.table(t.device)
        place = t * self.last
        low = place.floor().clamp(0, self.last - 1).long()
        start = table[low]
        end = table[low + 1]
        share = place - low
        if not self.ends_in_zero:
            return torch.lerp(start, end, share)
        alpha = start.sigmoid().sqrt() * (1 - share)
        to_zero = 2 * alpha.log() - torch.log1p(-(alpha**2))
        in_last = torch.where(share == 0, start, to_zero)
        elsewhere = torch.lerp(start, end.clamp(min=-1e300), share)
        return torch.where(low == self.last - 1, in_last, elsewhere)

    def time_of(self, log_snr: Tensor) -> Tensor:
        """The inverse of log_snr."""
        table = self.table(log_snr.device)
        low = (torch.searchsorted(-table, -log_snr.contiguous()) - 1).clamp(0, self.last - 1)
        start = table[low]
        end = table[low + 1]
        share = (log_snr - start) / (end - start)
        if self.ends_in_zero:
            in_last = 1 - ((log_snr.sigmoid() / start.sigmoid()).sqrt())
            share = torch.where(low == self.last - 1, in_last, share)
        return (low + share) / self.last


def from_betas(name: str, betas: Tensor, keys: str) -> Schedule:
    """alpha_bar_i = prod_{j <= i} (1 - beta_j) (Ho et al. 2020, eq. 4).

    betas [T], each in (0, 1], else UserError, which names `keys`.
    """
    betas = _numbers(name, betas, keys)
    allowed = (betas > 0) & (betas <= 1)
    if not bool(allowed.all()):
        bad = betas[~allowed][0].item()
        problem = f"schedule={name} has a beta of {bad:g}; every beta lies in (0, 1]"
        raise curve_error(problem, keys)
    # ln(alpha_bar) by log1p, and ln(1 - alpha_bar) by expm1: nothing cancels where beta or
    # alpha_bar is tiny.
    log_alpha_bar = torch.log1p(-betas).cumsum(0)
    return _schedule(name, log_alpha_bar - torch.log(-torch.expm1(log_alpha_bar)), keys)


def from_alphas_cumprod(name: str, alphas_cumprod: Tensor, keys: str) -> Schedule:
    """The schedule of alpha_bar_i = alphas_cumprod[i].

    alphas_cumprod [T], falling strictly from below 1 to 0 or more, else UserError, which names
    `keys`.
    """
    alpha_bar = _numbers(name, alphas_cumprod, keys)
    in_range = bool(((alpha_bar >= 0) & (alpha_bar < 1)).all())
    if not in_range or not bool((alpha_bar.diff() < 0).all()):
        raise curve_error(
            f"schedule={name}: alphas_cumprod must fall from each timestep to the next, "
            "within [0, 1)",
            keys,
        )
    return _schedule(name, alpha_bar.log() - torch.log1p(-alpha_bar), keys)


def _numbers(name: str, values: Tensor, keys: str) -> Tensor:
    values = torch.as_tensor(values, dtype=torch.float64)
    if values.ndim != 1 or len(values) < 2:
        raise curve_error(
            f"schedule={name} needs at least 2 timesteps in one list, it has {tuple(values.shape)}",
            keys,
        )
    return values


def _schedule(name: str, log_snr: Tensor, keys: str) -> Schedule:
    points = Points(log_snr)
    return Schedule(
        name,
        points.log_snr,
        points.time_of,
        num_timesteps=len(log_snr),
        points=True,
        even_timesteps=True,
        keys=keys,
    )


def read(path: str, key: str) -> list[float]:
    """The numbers in a text file, as a JSON list or one after the other.

    Raises UserError, which names the key.
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
            f"is no readable text file of numbers: {error}",
            key=key,
            value=path,
            remedy=f"Give a list, or a file, in {key}.",
        ) from error


def table(
    *,
    betas: list[float] | str | None = None,
    alphas_cumprod: list[float] | str | None = None,
    num_timesteps: int = 1000,
) -> Schedule:
    """The user's own table: betas or alphas_cumprod, each a list or the name of a text file.

    num_timesteps: of the model, as many as the table must have, else UserError; a network trained
    on 1000 timesteps reads nothing sensible from a table of 50.
    """
    if (betas is None) == (alphas_cumprod is None):
        raise UserError(
            "schedule=table takes one table",
            key="schedule.betas",
            remedy="Set schedule.betas or schedule.alphas_cumprod, a list of numbers or a file of "
            "them.",
        )
    if betas is not None:
        key = "schedule.betas"
        return from_betas("table", _values(betas, key, num_timesteps), key)
    key = "schedule.alphas_cumprod"
    return from_alphas_cumprod("table", _values(alphas_cumprod, key, num_timesteps), key)


def _values(given: list[float] | str, key: str, num_timesteps: int) -> Tensor:
    """The user's numbers [num_timesteps], float64. Raises UserError for another number of them."""
    numbers = read(given, key) if isinstance(given, str) else given
    values = torch.tensor(numbers, dtype=torch.float64)
    count = len(values)
    if count < 2:
        raise UserError(f"{key} has {count} timesteps; a table has at least 2", key=key)
    if count != num_timesteps:
        raise UserError(
            f"{key} has {count} timesteps, but the model is made for {num_timesteps}",
            key=key,
            remedy=f"Give as many, or set schedule.num_timesteps={count}.",
        )
    return values
