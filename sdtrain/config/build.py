"""Configuration to objects: the only place that calls a _target_."""

import functools
import inspect
from typing import Any

from sdtrain.config.check import target_of
from sdtrain.errors import UserError


def build(node: Any, key: str, **given: Any) -> Any:
    """Calls a node's _target_ with its arguments, built first, and with those of `given` that it
    takes.

    A plain value is returned as it is. UserError names the key.
    """
    if isinstance(node, list):
        return [build(item, f"{key}[{place}]") for place, item in enumerate(node)]
    if not isinstance(node, dict):
        return node
    arguments = {}
    for name, value in node.items():
        if name not in ("_target_", "_partial_"):
            arguments[name] = build(value, f"{key}.{name}")
    if "_target_" not in node:
        return arguments
    target = target_of(node, key)
    taken = inspect.signature(target).parameters
    arguments |= {name: value for name, value in given.items() if name in taken}
    if node.get("_partial_"):
        return functools.partial(target, **arguments)
    try:
        return target(**arguments)
    except UserError:
        raise
    except (ValueError, TypeError, ArithmeticError) as error:
        message = str(error)
        if not message.startswith(f"{key}."):
            message = f"{key}: {message}"
        raise UserError(message, key=_key_in(message, key)) from error


def _key_in(message: str, key: str) -> str:
    """The key that a message of a constructor begins with, else that of the node."""
    first = message.partition("=")[0].partition(":")[0]
    return first if first.startswith(f"{key}.") and " " not in first else key
