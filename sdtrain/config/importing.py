"""Import in less time, and say why a user's class or function could not be imported."""

import contextlib
import difflib
import gc
import importlib
import traceback
from collections.abc import Iterator
from pathlib import Path

import hydra

LONGEST = 600  # characters
SIMILAR = 0.6  # least similarity of a suggested name


@contextlib.contextmanager
def collector_off() -> Iterator[None]:
    """Search for no garbage within the block, which is to hold imports of large packages.

    What they make stays, and searching it again and again takes a quarter of their time. It is not
    searched later either: that took another second before the first step, and a forked worker of a
    loader would have to copy it.
    """
    gc.collect()  # what is garbage already would stay for ever
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def import_failure(error: BaseException) -> str:
    """Return what the user's module raised, and the line that raised it.

    error: raised by Hydra, with the exception of the module as its cause.
    """
    raised = error.__cause__ or error
    while isinstance(raised.__context__, AttributeError) and raised.__cause__ is None:
        # The module exists but lacks the name, and Hydra then tried the name as a module too.
        raised = raised.__context__
    first = raised
    while first.__cause__ is not None:
        first = first.__cause__
    reason = _describe(raised)
    if first is not raised:
        reason += f", because of {_describe(first)}"
    return f"{reason[:LONGEST]}{_location(first)}"


def _describe(error: BaseException) -> str:
    """Return the type and the message of an exception, with the closest name that exists."""
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    description = f"{type(error).__name__}: {' '.join(str(message).split())}".rstrip(".: ")
    if isinstance(error, AttributeError) and error.name is not None:
        close = difflib.get_close_matches(error.name, dir(error.obj), 1, SIMILAR)
        description += f". Did you mean '{close[0]}'?" if close else ""
    return description


def _location(error: BaseException) -> str:
    """Return file and line of the innermost frame outside of Hydra and the import machinery."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}, line {error.lineno})"
    machinery = tuple(str(Path(module.__file__).parent) for module in (hydra, importlib))
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(("<", *machinery)):
            return f" ({frame.filename}, line {frame.lineno})"
    return ""
