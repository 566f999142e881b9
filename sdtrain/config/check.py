"""Every node with a _target_ is held against that target's signature before anything is built."""

import difflib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, get_type_hints

from hydra.utils import get_object
from pydantic import (
    ConfigDict,
    PydanticSchemaGenerationError,
    PydanticUserError,
    TypeAdapter,
    ValidationError,
)

from sdtrain.errors import UserError

SPECIAL = {"_target_", "_partial_"}


def nearest(word: str, words: Iterable[str]) -> str:
    words = sorted(words)
    close = difflib.get_close_matches(word, words, 1, 0.6)
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" Allowed: {', '.join(words)}." if 0 < len(words) <= 40 else ""


def flat(node: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf and every inner node."""
    for key, value in node.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")


def target_of(node: dict, key: str) -> Callable:
    try:
        target = get_object(node["_target_"])
    except Exception as error:  # whatever an import of the user's package raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{key}._target_={node['_target_']} cannot be imported: {reason}. Give package.module.Name in {key}._target_."
        ) from error
    if not callable(target):
        raise UserError(
            f"{key}._target_={node['_target_']} is no class or function. Give package.module.Name in {key}._target_."
        )
    return target


def check(
    node: Any, key: str, filled_in: set[str], typed: set[str], beside: Iterable[str] = ()
) -> list[str]:
    """Checks a node and all below it. Returns notes to print.

    filled_in: arguments that sdtrain gives itself. typed: the keys that the user typed: what a yaml brought along for our own class, and the
    user's own class in its place does not take, is left out with a note; what was typed for it must be taken. beside: keys of this node that are
    read elsewhere.
    """
    notes: list[str] = []
    if isinstance(node, dict):
        if "_target_" in node:
            notes += check_call(node, key, target_of(node, key), filled_in, typed, beside)
        for name, value in node.items():
            notes += check(value, f"{key}.{name}", filled_in, typed)
    elif isinstance(node, list):
        for place, value in enumerate(node):
            notes += check(value, f"{key}[{place}]", filled_in, typed)
    return notes


def check_call(
    node: dict,
    key: str,
    target: Callable,
    filled_in: set[str],
    typed: set[str],
    beside: Iterable[str] = (),
) -> list[str]:
    """Checks the arguments in `node` as a call of `target`. Raises UserError that names the key."""
    prefix, name = f"{key}." if key else "", node.get("_target_", "sdtrain")
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return []  # a builtin without a signature
    try:
        hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (
        Exception
    ):  # a hint of foreign code that cannot be resolved says nothing about the user's value
        hints = {}
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and name.startswith("sdtrain."):
        raise AssertionError(f"{name} takes **kwargs, which swallow typos")
    open_ended, left_out = any(p.kind is p.VAR_KEYWORD for p in parameters.values()), []
    for argument in [a for a in node if a not in SPECIAL]:
        if argument in filled_in and argument in parameters:
            raise UserError(f"{prefix}{argument} cannot be set: sdtrain fills it in. Remove it.")
        if argument not in parameters and not open_ended:
            if not name.startswith("sdtrain") and not any(
                t == f"{prefix}{argument}" or t.startswith(f"{prefix}{argument}.") for t in typed
            ):
                left_out.append(argument)
                continue
            allowed = set(parameters) - filled_in | set(beside)
            raise UserError(
                f"There is no key '{prefix}{argument}'{f': {name} has no argument of that name' if key else ''}.{nearest(argument, allowed)}"
            )
        if argument in hints:
            check_value(node[argument], hints[argument], f"{prefix}{argument}")
    for argument in left_out:
        del node[argument]
    required = [
        n
        for n, p in parameters.items()
        if p.default is p.empty and p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    missing = [n for n in required if n not in node and n not in filled_in]
    if missing and not node.get("_partial_"):
        wanted = " and ".join(f"{prefix}{n}" for n in missing)
        raise UserError(
            f"{name} needs {wanted}. Set {'it' if len(missing) == 1 else 'them'}, as +{prefix}{missing[0]}=..."
        )
    return [f"{key}: {name} does not take {', '.join(left_out)}: left out."] if left_out else []


def check_value(value: Any, hint: Any, key: str) -> None:
    if hint is Any or isinstance(value, dict) and "_target_" in value:
        return  # an object to be built, not a plain value
    try:
        try:
            adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
        except PydanticUserError:  # dataclasses bring their own configuration
            adapter = TypeAdapter(hint)
        # Strict, and by way of JSON: a list may be a tuple, a string a path, an int a float; a string is no number and true no int.
        adapter.validate_json(json.dumps(value), strict=True)
    except (PydanticSchemaGenerationError, PydanticUserError, TypeError):
        return  # a hint that is no plain type: a protocol, a class of ours
    except ValidationError as error:
        messages = dict.fromkeys(
            each["msg"].removeprefix("Input should be ") for each in error.errors()
        )
        reason = (
            " or ".join(m for m in messages if not m.startswith("Cannot check")) or "an object"
        )  # "Cannot check": of a class, as Tensor
        raise UserError(
            f"{key}={json.dumps(value, ensure_ascii=False)} has the wrong type: it should be {reason}. Change {key}."
        ) from None
