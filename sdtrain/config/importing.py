"""Why a user's class or function could not be imported."""

import difflib
import importlib
import traceback
from pathlib import Path

import hydra

LONGEST = 600  # characters


def import_failure(error: BaseException) -> str:
    """What the user's module has raised, and the line of it that did.

    error: Hydra's, which tells it in a cause.
    """
    own = error.__cause__ or error
    while isinstance(own.__context__, AttributeError) and own.__cause__ is None:
        own = own.__context__  # the module is there, and Hydra took the name for a module's too
    first = own
    while first.__cause__ is not None:
        first = first.__cause__
    reason = _described(own)
    if first is not own:
        reason += f", because of {_described(first)}"
    return f"{reason[:LONGEST]}{_place_of(first)}"


def _described(error: BaseException) -> str:
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    described = f"{type(error).__name__}: {' '.join(str(message).split())}".rstrip(".: ")
    if isinstance(error, AttributeError) and error.name is not None:
        close = difflib.get_close_matches(error.name, dir(error.obj), 1, 0.6)
        described += f". Did you mean '{close[0]}'?" if close else ""
    return described


def _place_of(error: BaseException) -> str:
    """The innermost line of a file that is neither Hydra's nor of the import itself."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}, line {error.lineno})"
    searching = tuple(str(Path(module.__file__).parent) for module in (hydra, importlib))
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(("<", *searching)):
            return f" ({frame.filename}, line {frame.lineno})"
    return ""
