"""Errors that the user can fix. Does not import torch, so that a command prints them quickly."""

import json
from pathlib import Path
from typing import Any

_NOT_GIVEN = object()


def first_line(error: object) -> str:
    """Return the first line of an error's text, or the name of its class if it has none.

    A line that ends in a colon says nothing without the next one, which is appended.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if lines[0].endswith(":"):
        return " ".join(lines[:2])
    return lines[0]


class UserError(Exception):
    """A mistake of the user, or a problem of the user's data or machine.

    It is printed as one paragraph without a traceback.

    Args:
        problem: what is wrong. With a key and a value it continues the sentence that they begin,
            as in UserError("must be at least 1", key="trainer.devices", value=0); otherwise it is a
            complete sentence.
        key: the configuration key to change, even if the problem already names it.
        value: the value of the key.
        allowed: the values that are allowed.
        remedy: what to do, in complete sentences.

    Attributes:
        log: the file that holds the traceback; None if none was written.
        on_every_rank: whether this process prints it, whatever its rank; None: only on rank 0.
        prefix: printed before the problem.
    """

    exit_code = 2

    def __init__(
        self,
        problem: str,
        *,
        key: str | None = None,
        value: Any = _NOT_GIVEN,
        allowed: str = "",
        remedy: str = "",
    ) -> None:
        super().__init__(problem)
        self.problem = problem
        self.key = key
        self.has_value = value is not _NOT_GIVEN
        self.value = value if self.has_value else None
        self.allowed = allowed
        self.remedy = remedy
        self.log: Path | None = None
        self.on_every_rank: bool | None = None
        self.prefix = ""

    def __str__(self) -> str:
        return paragraph(self)

    def with_prefix(self, prefix: str) -> "UserError":
        """Return a copy of the error whose paragraph begins with `prefix: `."""
        other = type(self).__new__(type(self), *self.args)  # a subclass's __init__ may differ
        vars(other).update(vars(self))
        other.prefix = f"{prefix}: {self.prefix}"
        return other


class DataError(UserError):
    """The data do not fit the configuration or are invalid."""

    exit_code = 3


class DivergedError(UserError):
    """The loss, a gradient or a weight is not finite."""

    exit_code = 4


class StorageError(UserError):
    """A file cannot be written, or one that should be read is missing or damaged."""

    exit_code = 5


class RankError(UserError):
    """One of several ranks hung, died or raised."""

    exit_code = 6


def paragraph(error: UserError) -> str:
    """Return the paragraph that is printed for an error: problem, allowed values, remedy."""
    problem = error.problem
    if error.has_value:
        problem = f"{error.key}={format_value(error.value)} {problem}"
    sentences = [_full_stop(f"{error.prefix}{problem}")]
    if error.allowed:
        sentences.append(_full_stop(f"Allowed: {error.allowed}"))
    if error.remedy:
        sentences.append(_full_stop(error.remedy))
    return " ".join(" ".join(sentences).split())


def format_value(value: Any) -> str:
    """Return a value as it would be typed on the command line."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:g}"
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        return str(value)


def _full_stop(sentence: str) -> str:
    sentence = sentence.rstrip()
    return sentence if sentence.endswith((".", "?", "!")) else f"{sentence}."
