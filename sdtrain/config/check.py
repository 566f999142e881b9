"""Every node with a _target_ is held against that target's signature before anything is built."""

import difflib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_type_hints

from hydra.utils import get_object
from pydantic import (
    ConfigDict,
    PydanticSchemaGenerationError,
    PydanticUserError,
    TypeAdapter,
    ValidationError,
)

from sdtrain.config.importing import import_failure
from sdtrain.errors import UserError

SPECIAL = {"_target_", "_partial_"}

FILLED_IN = frozenset(
    {
        "condition_channels",
        "data",
        "denoisers",
        "density",
        "drawing",
        "ema",
        "guidance_scale",
        "metrics_log",
        "name",
        "objective",
        "optimisation",
        "progress",
        "resumed",
        "run_dir",
        "schedule",
        "signals",
    }
)
"""Arguments that sdtrain gives itself to whatever takes them: they cannot be configured."""


CLOSE = 0.72
"""The least likeness of a word that is suggested: "image" is no slip for "num_images" (0.67)."""


def nearest(word: str, words: Iterable[str]) -> str:
    """A sentence with the nearest of the words, or all of them where they are few. It begins with a
    space.
    """
    known = sorted(words)
    close = difflib.get_close_matches(word, known, 1, CLOSE)
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" Allowed: {', '.join(known)}." if 0 < len(known) <= 40 else ""


def target_of(node: dict, key: str) -> Callable:
    """The class or function that a node names. UserError where it cannot be imported."""
    name = node["_target_"]
    how = f"Give package.module.Name in {key}._target_."
    try:
        target = get_object(name)
    except Exception as error:  # whatever an import of the user's package raises
        problem = f"cannot be imported: {import_failure(error)}"
        raise UserError(problem, key=f"{key}._target_", value=name, remedy=how) from error
    if not callable(target):
        raise UserError("is no class or function", key=f"{key}._target_", value=name, remedy=how)
    return target


class Checker:
    """Checks nodes of a configuration as calls of their targets. It changes none of them: each
    check returns a copy.

    What a yaml brought along for sdtrain's own class, and the user's own class in its place does
    not take, is left out of the copy, with a line in `notes`; what the user typed for that class
    must be taken.

    Args:
        typed: the keys that the user typed.
        filled_in: arguments that sdtrain gives itself.
    """

    def __init__(self, typed: Iterable[str], filled_in: Iterable[str] = FILLED_IN) -> None:
        self.typed = set(typed)
        self.filled_in = set(filled_in)
        self.notes: list[str] = []

    def node(self, node: Any, key: str, beside: Iterable[str] = ()) -> Any:
        """Checks a node and all below it. beside: keys of this node that are read elsewhere."""
        if isinstance(node, list):
            return [self.node(value, f"{key}[{place}]") for place, value in enumerate(node)]
        if not isinstance(node, dict):
            return node
        checked = node
        if "_target_" in node:
            checked = self.call(node, key, target_of(node, key), beside)
        return {name: self.node(value, f"{key}.{name}") for name, value in checked.items()}

    def call(
        self, node: dict, key: str, target: Callable, beside: Iterable[str] = ()
    ) -> dict[str, Any]:
        """Checks the arguments in `node` as a call of `target`. UserError names the key."""
        prefix = f"{key}." if key else ""
        name = node.get("_target_", "sdtrain")
        parameters = _parameters(target)
        if parameters is None:
            return dict(node)
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if open_ended and name.startswith("sdtrain."):
            raise AssertionError(f"{name} takes **kwargs, which swallow typos")
        hints = _hints(target)
        left_out = []
        for argument in [a for a in node if a not in SPECIAL]:
            full_key = f"{prefix}{argument}"
            if argument in self.filled_in and argument in parameters:
                raise UserError(
                    f"{full_key} cannot be set: sdtrain fills it in",
                    key=full_key,
                    remedy="Remove it.",
                )
            if argument not in parameters and not open_ended:
                if not name.startswith("sdtrain") and not self._is_typed(full_key):
                    left_out.append(argument)
                    continue
                raise _unknown_key(full_key, name, set(parameters) - self.filled_in | set(beside))
            if argument in hints:
                check_value(node[argument], hints[argument], full_key)
        self._require(node, prefix, name, parameters)
        if left_out:
            self.notes.append(f"{key}: {name} does not take {', '.join(left_out)}: left out.")
        return {argument: value for argument, value in node.items() if argument not in left_out}

    def _is_typed(self, key: str) -> bool:
        return any(typed == key or typed.startswith(f"{key}.") for typed in self.typed)

    def _require(self, node: dict, prefix: str, name: str, parameters: Mapping) -> None:
        """UserError where an argument without a default is missing."""
        if node.get("_partial_"):
            return
        missing = []
        for argument, p in parameters.items():
            required = p.default is p.empty and p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
            if required and argument not in node and argument not in self.filled_in:
                missing.append(f"{prefix}{argument}")
        if missing:
            it = "it" if len(missing) == 1 else "them"
            raise UserError(
                f"{name} needs {' and '.join(missing)}",
                key=missing[0],
                remedy=f"Set {it}, as +{missing[0]}=...",
            )


def check_value(value: Any, hint: Any, key: str) -> None:
    """UserError where a plain value is not of the hinted type. Hints that are no plain types are
    passed over.
    """
    if hint is Any or isinstance(value, dict) and "_target_" in value:
        return  # an object to be built
    try:
        # Strict, and by way of JSON: a list may be a tuple, a string a path, an int a float; a
        # string is no number and true no int.
        _type_adapter(hint).validate_json(json.dumps(value), strict=True)
    except (PydanticSchemaGenerationError, PydanticUserError, TypeError):
        return  # a protocol, a class of ours
    except ValidationError as error:
        messages = [each["msg"].removeprefix("Input should be ") for each in error.errors()]
        # "Cannot check": of a class, as Tensor.
        plain = dict.fromkeys(m for m in messages if not m.startswith("Cannot check"))
        wanted = " or ".join(plain) or "an object"
        typed = json.dumps(value, ensure_ascii=False)
        raise UserError(
            f"{key}={typed} has the wrong type: it should be {wanted}",
            key=key,
            remedy=f"Change {key}.",
        ) from None


def _type_adapter(hint: Any) -> TypeAdapter:
    try:
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:  # dataclasses bring their own configuration
        return TypeAdapter(hint)


def _parameters(target: Callable) -> Mapping[str, inspect.Parameter] | None:
    """Of its signature; None for a builtin that has none."""
    try:
        return inspect.signature(target).parameters
    except (TypeError, ValueError):
        return None


def _hints(target: Callable) -> dict[str, Any]:
    """The annotations of its arguments; none where foreign code's cannot be resolved."""
    try:
        return get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:  # such a hint says nothing about the user's value
        return {}


def _unknown_key(key: str, name: str, allowed: set[str]) -> UserError:
    argument = key.rpartition(".")[2]
    whose = f": {name} has no argument of that name" if "." in key else ""
    return UserError(f"There is no key '{key}'{whose}.{nearest(argument, allowed)}", key=key)
