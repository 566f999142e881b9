"""What the arms of a sweep are called: by the words in which they differ."""

import re
from collections.abc import Sequence

LONGEST_WITH_WHOLE_KEYS = 80  # characters
LONGEST = 100  # of what a name may be without a number

Word = tuple[str, str]
"""Key and value."""


def arm_names(jobs: Sequence[Sequence[str]], first: int = 0) -> list[str]:
    """A folder's name for each job: the words in which the jobs differ.

    They are numbered, from `first` on, where the words do not tell them apart or are too long.

    Args:
        jobs: the words of each arm, KEY=VALUE, in the same order.
    """
    pairs = [[_key_and_value(word) for word in job] for job in jobs]
    differing = _differing_places(pairs)
    names = [_joined(job, differing) for job in pairs]
    if _longest(names) > LONGEST_WITH_WHOLE_KEYS:
        short = [[(key.rpartition(".")[2], value) for key, value in job] for job in pairs]
        names = [_joined(job, differing) for job in short]
    if differing and len(set(names)) == len(names) and _longest(names) <= LONGEST:
        return names
    numbered = []
    for number, name in enumerate(names, first):
        numbered.append(f"{number}_{name[:LONGEST_WITH_WHOLE_KEYS]}".rstrip("_"))
    return numbered


def _key_and_value(word: str) -> Word:
    key, _, value = word.lstrip("+").partition("=")
    return key, value


def _differing_places(jobs: list[list[Word]]) -> list[int]:
    """The places in a job's list of words at which not all jobs say the same."""
    return [place for place in range(len(jobs[0])) if len({job[place] for job in jobs}) > 1]


def _joined(job: list[Word], places: list[int]) -> str:
    """KEY=VALUE,KEY=VALUE in characters that every file system and shell takes."""
    words = [f"{job[place][0]}={job[place][1]}" for place in places]
    without_quotes = re.sub(r"""['"\[\]]""", "", ",".join(words))
    return re.sub(r"[^\w.,=+-]+", "_", without_quotes)


def _longest(names: list[str]) -> int:
    return max(len(name) for name in names)
