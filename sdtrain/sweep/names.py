"""Names for the arms of a sweep, made of the overrides in which they differ."""

import re
from collections.abc import Sequence

LONGEST_WITH_WHOLE_KEYS = 80  # characters; in longer names, keys are shortened to their last part
LONGEST = 100  # characters; arms whose names are still longer are numbered

Override = tuple[str, str]
"""Key and value."""


def name_arms(jobs: Sequence[Sequence[str]], first_number: int = 0) -> list[str]:
    """Return a folder name for each job, made of the overrides in which the jobs differ.

    The jobs are numbered, from `first_number` on, if these overrides are too long or do not tell
    the jobs apart.

    Args:
        jobs: the overrides KEY=VALUE of each arm, in the same order for all arms.
        first_number: number of the first job.
    """
    parsed = [_split_overrides(job) for job in jobs]
    positions = _differing_positions(parsed)
    names = _folder_names(parsed, positions)
    if _longest(names) > LONGEST_WITH_WHOLE_KEYS:
        names = _folder_names(parsed, positions, shorten_keys=True)
    are_distinct = len(set(names)) == len(names)
    if positions and are_distinct and _longest(names) <= LONGEST:
        return names
    numbered = []
    for number, name in enumerate(names, first_number):
        numbered.append(f"{number}_{name[:LONGEST_WITH_WHOLE_KEYS]}".rstrip("_"))
    return numbered


def _split_overrides(job: Sequence[str]) -> list[Override]:
    overrides = []
    for word in job:
        key, _, value = word.lstrip("+").partition("=")
        overrides.append((key, value))
    return overrides


def _differing_positions(jobs: list[list[Override]]) -> list[int]:
    """Return the positions at which the jobs' lists of overrides are not all equal."""
    differing = []
    for position, override in enumerate(jobs[0]):
        if any(job[position] != override for job in jobs):
            differing.append(position)
    return differing


def _folder_names(
    jobs: list[list[Override]], positions: list[int], *, shorten_keys: bool = False
) -> list[str]:
    """Return the name KEY=VALUE,KEY=VALUE of each job, made of the overrides at `positions`.

    shorten_keys: keep only the last part of each key, so that model.unet.channels becomes channels.
    """
    names = []
    for job in jobs:
        words = []
        for position in positions:
            key, value = job[position]
            if shorten_keys:
                key = key.rpartition(".")[2]
            words.append(f"{key}={value}")
        names.append(_safe_name(",".join(words)))
    return names


def _safe_name(name: str) -> str:
    """Replace characters that are not safe in every file system and shell."""
    without_quotes = re.sub(r"""['"\[\]]""", "", name)
    return re.sub(r"[^\w.,=+-]+", "_", without_quotes)


def _longest(names: list[str]) -> int:
    return max(map(len, names))
