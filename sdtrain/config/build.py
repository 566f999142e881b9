"""Build objects from a configuration. Only this module calls a _target_."""

import functools
import inspect
from typing import Any

from sdtrain.config.check import import_target
from sdtrain.errors import UserError


def build(node: Any, key: str, **available: Any) -> Any:
    """Build the arguments of a node, then call its _target_ with them.

    A node without _target_ is returned with its items built, a plain value as it is. Raises
    UserError, which names the key.

    Args:
        node: of the configuration.
        key: of the node, for messages.
        available: further arguments, of which the target gets those that it takes.
    """
    if isinstance(node, list):
        return [build(item, f"{key}[{index}]") for index, item in enumerate(node)]
    if not isinstance(node, dict):
        return node
    arguments = {}
    for name, value in node.items():
        if name not in ("_target_", "_partial_"):
            arguments[name] = build(value, f"{key}.{name}")
    if "_target_" not in node:
        return arguments
    target = import_target(node, key)
    parameters = inspect.signature(target).parameters
    for name, value in available.items():
        if name in parameters:
            arguments[name] = value
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
    """Return the key that a constructor's error message begins with, or else that of the node."""
    first = message.partition("=")[0].partition(":")[0]
    return first if first.startswith(f"{key}.") and " " not in first else key
