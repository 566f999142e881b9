"""Replacing secrets by *** in what a run writes and prints."""

import os
import re
from typing import Any

VARIABLE = re.compile("KEY|TOKEN|SECRET|PASSW|CREDENTIAL|_PAT$", re.IGNORECASE)
"""Names of environment variables that hold a secret."""

KEY = r"(?:\w*[._-])?(?:api_?key|access_?key|token|secret|password|passwd|credentials?)"
"""Names of keys and of a URL's parameters that hold one."""

ASSIGNED = re.compile(rf"(?<![\w])({KEY})=([^\s&'\"]+)", re.IGNORECASE)
LOGIN = re.compile(r"(?<=://)[^\s/@:]*:[^\s/@]+(?=@)")
"""user:password in a URL."""

SHORTEST = 8
"""Characters of a variable's value: a shorter one may be an ordinary word."""

HIDDEN = "***"


def redacted(node: Any) -> Any:
    """Nested dicts, lists and strings with *** in place of secrets.

    A secret is what is named like one, as a key, a URL's parameter or a variable of the
    environment, and a login in a URL. What is to be built, _target_, is none.
    """
    if isinstance(node, dict):
        return {key: _redacted_value(key, value) for key, value in node.items()}
    if isinstance(node, list):
        return [redacted(value) for value in node]
    if isinstance(node, str):
        return _redacted_text(node)
    return node


def _redacted_value(key: Any, value: Any) -> Any:
    if isinstance(value, str) and re.fullmatch(KEY, str(key), re.IGNORECASE):
        return HIDDEN
    return value if key == "_target_" else redacted(value)


def _redacted_text(text: str) -> str:
    for secret in sorted(_secrets(), key=len, reverse=True):
        # A quoted command and a repr put backslashes in.
        pattern = "".join(rf"\\*{re.escape(character)}" for character in secret)
        text = re.sub(pattern, HIDDEN, text)
    return ASSIGNED.sub(rf"\1={HIDDEN}", LOGIN.sub(HIDDEN, text))


def _secrets() -> list[str]:
    """The values of the environment's variables that are named like secrets."""
    found = []
    for name, value in os.environ.items():
        if VARIABLE.search(name) and len(value) >= SHORTEST:
            found.append(value)
    return found
