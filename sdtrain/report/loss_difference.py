"""Where the training losses of two runs first differ."""

from itertools import pairwise

from sdtrain.report.record import MeasuredRun
from sdtrain.report.section import Section


def loss_difference_section(one: MeasuredRun, other: MeasuredRun) -> Section:
    """Return a section that says in one sentence where the training losses first differ."""
    count, images_seen = first_loss_difference(one, other)
    if not count:
        sentence = (
            "The two runs have logged no training loss over the same images (trainer.log_every)."
        )
    elif images_seen is not None:
        sentence = f"The training losses first differ at {images_seen} images seen."
    elif count == 1:
        sentence = "The only training loss that both runs have logged is equal."
    else:
        sentence = f"The {count} training losses that both runs have logged are all equal."
    return Section("Training losses of the two runs", [sentence])


def first_loss_difference(one: MeasuredRun, other: MeasuredRun) -> tuple[int, int | None]:
    """Return (number of logged losses to compare, images seen at the first that differs).

    Losses compare where both runs logged one over the same images. The second is None where all
    are equal.
    """
    losses = _logged_losses(one)
    other_losses = _logged_losses(other)
    intervals = sorted(losses.keys() & other_losses.keys())
    for interval in intervals:
        if losses[interval] != other_losses[interval]:
            return len(intervals), interval[1]
    return len(intervals), None


def _logged_losses(run: MeasuredRun) -> dict[tuple[int, int], float]:
    """Return {(images seen at the start, at the end) of an interval: its mean loss}.

    A line of metrics.jsonl holds the mean loss since the line before it.
    """
    ends = [0]
    losses = []
    for line in run.lines:
        if "train/loss" in line:
            ends.append(line["images_seen"])
            losses.append(line["train/loss"])
    return dict(zip(pairwise(ends), losses, strict=True))
