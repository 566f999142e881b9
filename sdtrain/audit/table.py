"""The table that sdtrain-schedule prints."""

import torch
from rich import box
from rich.table import Table

from sdtrain.audit.entries import Entry
from sdtrain.diffusion.effective_weight import EffectiveWeight

CAPTION = (
    "SNR, mean, variance: what remains of the data at t = 1. Half the loss: the log_snrs between "
    "which the middle half of a linear denoiser's loss lies, for latents of unit variance."
)


def entries_table(entries: list[Entry]) -> Table:
    """Return a table with a row for each entry."""
    table = Table(
        box=box.SIMPLE_HEAD, caption=CAPTION, caption_justify="left", padding=(0, 1, 0, 0)
    )
    table.add_column("", overflow="fold")
    for head in ("log_snr", "SNR", "mean", "variance", "half the loss"):
        table.add_column(head, justify="right", no_wrap=True)
    for entry in entries:
        alpha, sigma = entry.terminal_alpha_sigma
        schedule = entry.schedule
        table.add_row(
            entry.name,
            f"{schedule.log_snr_min:.2f} .. {schedule.log_snr_max:.2f}",
            f"{(alpha / sigma) ** 2:.2g}",
            f"{100 * alpha:.2g} %",
            f"{100 * entry.leaked_variance:.2g} %",
            _half_the_loss(entry),
        )
    return table


def _half_the_loss(entry: Entry) -> str:
    if entry.refusal:
        return "refused"
    if entry.weight is None:
        return ""
    low, high = middle_half(entry.weight)
    return f"{low:.1f} .. {high:.1f}"


def middle_half(effective: EffectiveWeight) -> tuple[float, float]:
    """Return the log_snrs between which the middle half of the loss of a linear denoiser lies.

    The squared error of epsilon of the best linear denoiser is SNR / (1 + SNR) = sigmoid(log_snr)
    for latents of unit variance.
    """
    log_snr = effective.log_snr
    loss = effective.weight * log_snr.sigmoid()
    cumulative = torch.cumulative_trapezoid(loss, log_snr)
    quartiles = []
    for fraction in (0.25, 0.75):
        index = (cumulative >= fraction * cumulative[-1]).nonzero()[0]
        quartiles.append(log_snr[1:][index].item())
    return quartiles[0], quartiles[1]
