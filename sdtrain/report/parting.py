"""Of two runs: at how many images their training losses part."""

from itertools import pairwise

from sdtrain.report.record import MeasuredRun
from sdtrain.report.section import Section


def where_they_part(one: MeasuredRun, other: MeasuredRun) -> Section:
    """Where, in a sentence."""
    lines, seen = parting(one, other)
    if not lines:
        sentence = (
            "The two runs have no line of the training loss over the same images "
            "(trainer.log_every)."
        )
    elif seen is not None:
        sentence = f"The training losses part at {seen} images seen."
    else:
        both = f"{lines} line{'s' if lines > 1 else ''} that both have"
        sentence = f"The training losses never part, in {both}."
    return Section("Two runs", [sentence])


def parting(one: MeasuredRun, other: MeasuredRun) -> tuple[int, int | None]:
    """(training losses over the same images that both have, images seen where they part).

    None instead of the latter where they never part.
    """
    mine = _losses(one)
    theirs = _losses(other)
    both = sorted(mine.keys() & theirs.keys())
    unequal = (span[1] for span in both if mine[span] != theirs[span])
    return len(both), next(unequal, None)


def _losses(run: MeasuredRun) -> dict[tuple[int, int], float]:
    """{(images seen at the beginning, at the end) of a stretch: its mean loss}.

    A line holds the mean since the line before it.
    """
    ends = [0]
    losses = []
    for line in run.lines:
        if "train/loss" in line:
            ends.append(line["images_seen"])
            losses.append(line["train/loss"])
    return dict(zip(pairwise(ends), losses, strict=True))
