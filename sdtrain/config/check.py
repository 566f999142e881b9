"""Check every node that has a _target_ against the signature of its target, before building any."""

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

HYDRA_KEYS = {"_target_", "_partial_"}

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
"""Arguments that sdtrain passes to every target that takes them. They cannot be configured."""


SUGGESTION_CUTOFF = 0.72
"""Least similarity of a suggested word: "image" is no typo of "num_images" (0.67)."""

MOST_LISTED = 40
"""If there are more allowed words than this, they are not listed."""


def suggest(word: str, words: Iterable[str]) -> str:
    """Return a sentence that suggests the closest of `words`, or lists them if there are not many.

    The sentence begins with a space. Empty if there is nothing to suggest.
    """
    allowed = sorted(words)
    close = difflib.get_close_matches(word, allowed, 1, SUGGESTION_CUTOFF)
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" Allowed: {', '.join(allowed)}." if 0 < len(allowed) <= MOST_LISTED else ""


def import_target(node: dict, key: str) -> Callable:
    """Return the class or function that `_target_` of a node names. Raises UserError."""
    name = node["_target_"]
    remedy = f"Set {key}._target_ to package.module.Name."
    try:
        target = get_object(name)
    except Exception as error:  # the import of a user's package may raise anything
        problem = f"cannot be imported: {import_failure(error)}"
        raise UserError(problem, key=f"{key}._target_", value=name, remedy=remedy) from error
    if not callable(target):
        problem = "is neither a class nor a function"
        raise UserError(problem, key=f"{key}._target_", value=name, remedy=remedy)
    return target


class Checker:
    """Checks configuration nodes as calls of their targets. Changes no node; returns copies.

    If the user replaces a class of sdtrain by one of his own, the node still has the arguments
    from sdtrain's yaml. Those that his class does not take are left out of the copy, and `notes`
    gets a line about them. An argument that the user typed is never left out: his class must take
    it.

    Args:
        typed: the keys that the user typed.
        filled_in: arguments that sdtrain passes itself.
    """

    def __init__(self, typed: Iterable[str], filled_in: Iterable[str] = FILLED_IN) -> None:
        self.typed = set(typed)
        self.filled_in = set(filled_in)
        self.notes: list[str] = []

    def node(self, node: Any, key: str, other_keys: Iterable[str] = ()) -> Any:
        """Check a node and all nodes below it. Raises UserError, which names the key.

        other_keys: keys of this node that its target does not take but that are read elsewhere.
        """
        if isinstance(node, list):
            return [self.node(value, f"{key}[{index}]") for index, value in enumerate(node)]
        if not isinstance(node, dict):
            return node
        checked = node
        if "_target_" in node:
            checked = self.call(node, key, import_target(node, key), other_keys)
        return {name: self.node(value, f"{key}.{name}") for name, value in checked.items()}

    def call(
        self, node: dict, key: str, target: Callable, other_keys: Iterable[str] = ()
    ) -> dict[str, Any]:
        """Check the arguments in `node` as a call of `target`. Raises UserError, which names the
        key.

        other_keys: as in `node`; they are suggested in place of an unknown key.
        """
        prefix = f"{key}." if key else ""
        name = node.get("_target_", "sdtrain")
        parameters = _parameters(target)
        if parameters is None:
            return dict(node)
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if takes_any and name.startswith("sdtrain."):
            raise AssertionError(f"{name} takes **kwargs, which would accept typos")
        hints = _type_hints(target)
        checked = {}
        left_out = []
        for argument, value in node.items():
            full_key = f"{prefix}{argument}"
            if argument in HYDRA_KEYS:
                checked[argument] = value
                continue
            if argument in self.filled_in and argument in parameters:
                raise UserError(
                    f"{full_key} cannot be set: sdtrain fills it in",
                    key=full_key,
                    remedy="Remove it.",
                )
            if argument not in parameters and not takes_any:
                if not name.startswith("sdtrain") and not self._is_typed(full_key):
                    left_out.append(argument)
                    continue
                allowed = set(parameters) - self.filled_in | set(other_keys)
                raise _unknown_key_error(full_key, name, allowed)
            if argument in hints:
                check_value(value, hints[argument], full_key)
            checked[argument] = value
        self._require_arguments(node, prefix, name, parameters)
        if left_out:
            self.notes.append(f"{key}: {name} does not take {', '.join(left_out)}: left out.")
        return checked

    def _is_typed(self, key: str) -> bool:
        return any(typed == key or typed.startswith(f"{key}.") for typed in self.typed)

    def _require_arguments(self, node: dict, prefix: str, name: str, parameters: Mapping) -> None:
        """Raise UserError if an argument without a default is missing."""
        if node.get("_partial_"):
            return
        missing = []
        for argument, parameter in parameters.items():
            if argument not in node and argument not in self.filled_in and _is_required(parameter):
                missing.append(f"{prefix}{argument}")
        if missing:
            pronoun = "it" if len(missing) == 1 else "them"
            raise UserError(
                f"{name} needs {' and '.join(missing)}",
                key=missing[0],
                remedy=f"Set {pronoun}, for example +{missing[0]}=...",
            )


def _is_required(parameter: inspect.Parameter) -> bool:
    by_keyword = (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    return parameter.default is parameter.empty and parameter.kind in by_keyword


def check_value(value: Any, hint: Any, key: str) -> None:
    """Raise UserError if a plain value does not have the type of the hint.

    Hints that are not plain types are not checked.
    """
    if hint is Any or isinstance(value, dict) and "_target_" in value:
        return  # an object to be built
    try:
        # Strict, but as JSON: a list may stand for a tuple, a string for a path, an int for a
        # float; a string is not a number, and true is not an int.
        _type_adapter(hint).validate_json(json.dumps(value), strict=True)
    except (PydanticSchemaGenerationError, PydanticUserError, TypeError):
        return  # a protocol, or a class of sdtrain
    except ValidationError as error:
        typed = json.dumps(value, ensure_ascii=False)
        raise UserError(
            f"{key}={typed} has the wrong type: it should be {_expected(error)}",
            key=key,
            remedy=f"Change {key}.",
        ) from None


def _expected(error: ValidationError) -> str:
    """Return what pydantic would have accepted, such as "a valid integer or null"."""
    expected = []
    for each in error.errors():
        message = each["msg"].removeprefix("Input should be ")
        # pydantic writes "Cannot check ..." about a class such as Tensor.
        if message not in expected and not message.startswith("Cannot check"):
            expected.append(message)
    return " or ".join(expected) or "an object"


def _type_adapter(hint: Any) -> TypeAdapter:
    try:
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:  # raised for dataclasses, which have a config of their own
        return TypeAdapter(hint)


def _parameters(target: Callable) -> Mapping[str, inspect.Parameter] | None:
    """Return the parameters of the target's signature; None for a builtin that has none."""
    try:
        return inspect.signature(target).parameters
    except (TypeError, ValueError):
        return None


def _type_hints(target: Callable) -> dict[str, Any]:
    """Return the type hints of the target's arguments; empty if they cannot be resolved."""
    try:
        return get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:  # unresolvable hints of foreign code say nothing about the user's value
        return {}


def _unknown_key_error(key: str, name: str, allowed: set[str]) -> UserError:
    argument = key.rpartition(".")[2]
    whose = f": {name} has no argument of that name" if "." in key else ""
    return UserError(f"There is no key '{key}'{whose}.{suggest(argument, allowed)}", key=key)
