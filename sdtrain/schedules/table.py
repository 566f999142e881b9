"""Schedules made of a table: T betas, or their cumulative products."""

import json
import re
from pathlib import Path

import torch
from torch import Tensor

from sdtrain.errors import UserError
from sdtrain.schedules.schedule import Schedule


def timesteps(number: int) -> int:
    """`number`, if a table can have that many points. UserError where it has less than 2."""
    if number < 2:
        raise UserError(f"schedule.num_timesteps={number} must be at least 2.")
    return number


class Points:
    """log_snr at T points, point i at t = i / (T - 1); exact there, log_snr interpolated linearly between.

    Where the last point is -inf, alpha is interpolated in the last interval, so that it falls to 0 continuously.
    """

    def __init__(self, log_snr: Tensor) -> None:
        self.last, self.ends_in_zero = len(log_snr) - 1, log_snr[-1].item() == -float("inf")
        self.tables = {torch.device("cpu"): log_snr}

    def table(self, device: torch.device) -> Tensor:
        if (
            device not in self.tables
        ):  # kept per device: a copy in every step would wait for the host
            self.tables[device] = self.tables[torch.device("cpu")].to(device)
        return self.tables[device]

    def log_snr(self, t: Tensor) -> Tensor:
        table, place = self.table(t.device), t * self.last
        low = place.floor().clamp(0, self.last - 1).long()
        start, end, share = table[low], table[low + 1], place - low
        if not self.ends_in_zero:
            return torch.lerp(start, end, share)
        alpha = start.sigmoid().sqrt() * (1 - share)
        to_zero = 2 * alpha.log() - torch.log1p(-(alpha**2))
        return torch.where(
            low == self.last - 1,
            torch.where(share == 0, start, to_zero),
            torch.lerp(start, end.clamp(min=-1e300), share),
        )

    def time_of(self, log_snr: Tensor) -> Tensor:
        table = self.table(log_snr.device)
        low = (torch.searchsorted(-table, -log_snr.contiguous()) - 1).clamp(0, self.last - 1)
        start, end = table[low], table[low + 1]
        share = (log_snr - start) / (end - start)
        if self.ends_in_zero:
            share = torch.where(
                low == self.last - 1, 1 - ((log_snr.sigmoid() / start.sigmoid()).sqrt()), share
            )
        return (low + share) / self.last


def from_betas(name: str, betas: Tensor, keys: str) -> Schedule:
    """alpha_bar_i = prod_{j <= i} (1 - beta_j) (Ho et al. 2020, eq. 4). betas [T], each in (0, 1], else UserError, which names `keys`."""
    betas = _numbers(name, betas, keys)
    if not bool(((betas > 0) & (betas <= 1)).all()):
        bad = betas[~((betas > 0) & (betas <= 1))][0].item()
        raise UserError(
            f"schedule={name} has a beta of {bad:g}; every beta lies in (0, 1]. Change {keys}."
        )
    # ln(alpha_bar) by log1p, and ln(1 - alpha_bar) by expm1: nothing cancels where beta or alpha_bar is tiny.
    log_alpha_bar = torch.log1p(-betas).cumsum(0)
    return _schedule(name, log_alpha_bar - torch.log(-torch.expm1(log_alpha_bar)), keys)


def from_alphas_cumprod(name: str, alphas_cumprod: Tensor, keys: str) -> Schedule:
    """alphas_cumprod [T], falling strictly from below 1 to 0 or more, else UserError, which names `keys`."""
    alpha_bar = _numbers(name, alphas_cumprod, keys)
    if not bool(((alpha_bar >= 0) & (alpha_bar < 1)).all()) or not bool(
        (alpha_bar.diff() < 0).all()
    ):
        raise UserError(
            f"schedule={name}: alphas_cumprod must fall from each timestep to the next, within [0, 1). Change {keys}."
        )
    return _schedule(name, alpha_bar.log() - torch.log1p(-alpha_bar), keys)


def _numbers(name: str, values: Tensor, keys: str) -> Tensor:
    values = torch.as_tensor(values, dtype=torch.float64)
    if values.ndim != 1 or len(values) < 2:
        raise UserError(
            f"schedule={name} needs at least 2 timesteps in one list, it has {tuple(values.shape)}. Change {keys}."
        )
    return values


def _schedule(name: str, log_snr: Tensor, keys: str) -> Schedule:
    points = Points(log_snr)
    return Schedule(
        name, points.log_snr, points.time_of, num_timesteps=len(log_snr), points=True, keys=keys
    )


def read(path: str, key: str) -> list[float]:
    """The numbers in a text file, as a JSON list or one after the other. UserError names the key."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        return [
            float(word)
            for word in (
                json.loads(text)
                if text.lstrip().startswith("[")
                else re.split(r"[\s,;]+", text.strip(" \n\r\t,;"))
            )
        ]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{key}={path} is no readable text file of numbers: {error}. Give a list, or a file, in {key}."
        ) from error


def table(
    *,
    betas: list[float] | str | None = None,
    alphas_cumprod: list[float] | str | None = None,
    num_timesteps: int = 1000,
) -> Schedule:
    """The user's own table: betas or alphas_cumprod, each a list or the name of a text file. num_timesteps: of the model, as many as the
    table must have; a network trained on 1000 timesteps reads nothing sensible from a table of 50."""
    given = {
        key: value
        for key, value in (("betas", betas), ("alphas_cumprod", alphas_cumprod))
        if value is not None
    }
    if len(given) != 1:
        raise UserError(
            "schedule=table takes one table: set schedule.betas or schedule.alphas_cumprod, a list of numbers or a file of them."
        )
    ((name, value),) = given.items()
    key = f"schedule.{name}"
    values = torch.tensor(
        read(value, key) if isinstance(value, str) else value, dtype=torch.float64
    )
    if len(values) < 2:
        raise UserError(f"{key} has {len(values)} timesteps; a table has at least 2.")
    if len(values) != num_timesteps:
        raise UserError(
            f"{key} has {len(values)} timesteps, but the model is made for {num_timesteps}. Give as many, or set schedule.num_timesteps={len(values)}."
        )
    return (from_betas if name == "betas" else from_alphas_cumprod)("table", values, key)
