"""The user's mistakes. Imports nothing of torch, so that a command can report one at once."""

import json
from pathlib import Path
from typing import Any

_NOT_GIVEN = object()


class UserError(Exception):
    """A mistake of the user's, or of the user's data or machine: reported in one paragraph, without
    a traceback.

    Args:
        problem: what is wrong. With a key and a value it is the rest of the sentence that they
            begin, as in UserError("must be at least 1", key="trainer.devices", value=0); else a
            sentence of its own.
        key: the configuration key to change, also where the problem names it already.
        value: what was found there.
        allowed: what may stand there.
        remedy: what to do, in whole sentences.

    Attributes:
        log: file that holds its traceback, where one was written.
        aloud: whether this process prints it; None leaves it to rank 0.
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
        self.aloud: bool | None = None
        self.prefix = ""

    def __str__(self) -> str:
        return paragraph(self)

    def within(self, prefix: str) -> "UserError":
        """The same error, of the same class, whose paragraph begins with `prefix: `."""
        other = type(self).__new__(type(self), *self.args)  # a subclass may take other arguments
        vars(other).update(vars(self))
        other.prefix = f"{prefix}: {self.prefix}"
        return other


class DataError(UserError):
    """The data are not what the configuration says."""

    exit_code = 3


class DivergedError(UserError):
    """The loss, a gradient or a weight is not finite."""

    exit_code = 4


class StorageError(UserError):
    """A file that should be written or read back is not there, not whole, or has no room."""

    exit_code = 5


class RankError(UserError):
    """One of several ranks hung, died or raised."""

    exit_code = 6


def paragraph(error: UserError) -> str:
    """The one paragraph in which an error is reported: problem, allowed values, remedy."""
    problem = error.problem
    if error.has_value:
        problem = f"{error.key}={shown(error.value)} {problem}"
    sentences = [_full_stop(f"{error.prefix}{problem}")]
    if error.allowed:
        sentences.append(_full_stop(f"Allowed: {error.allowed}"))
    if error.remedy:
        sentences.append(_full_stop(error.remedy))
    return " ".join(" ".join(sentences).split())


def shown(value: Any) -> str:
    """A value as it would be typed on the command line."""
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
