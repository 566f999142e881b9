"""Replace secrets by *** in what a run writes and prints."""

import os
import re
from typing import Any

SECRET_VARIABLE = re.compile("KEY|TOKEN|SECRET|PASSW|CREDENTIAL|_PAT$", re.IGNORECASE)
"""Names of environment variables that hold a secret."""

SECRET_KEY = r"(?:\w*[._-])?(?:api_?key|access_?key|token|secret|password|passwd|credentials?)"
"""Names of configuration keys and URL parameters that hold a secret."""

ASSIGNMENT = re.compile(rf"(?<![\w])({SECRET_KEY})=([^\s&'\"]+)", re.IGNORECASE)
LOGIN = re.compile(r"(?<=://)[^\s/@:]*:[^\s/@]+(?=@)")
"""user:password in a URL."""

SHORTEST = 8
"""Least length of an environment variable's value: a shorter one may be an ordinary word."""

HIDDEN = "***"


def redacted(node: Any) -> Any:
    """Return nested dicts, lists and strings with *** in place of secrets.

    Secrets are values whose configuration key, URL parameter or environment variable is named like
    a secret, and logins in URLs. A _target_ is never one.
    """
    if isinstance(node, dict):
        return {key: _redacted_value(key, value) for key, value in node.items()}
    if isinstance(node, list):
        return [redacted(value) for value in node]
    if isinstance(node, str):
        return _redacted_text(node)
    return node


def _redacted_value(key: Any, value: Any) -> Any:
    if isinstance(value, str) and re.fullmatch(SECRET_KEY, str(key), re.IGNORECASE):
        return HIDDEN
    return value if key == "_target_" else redacted(value)


def _redacted_text(text: str) -> str:
    for secret in sorted(_environment_secrets(), key=len, reverse=True):
        # Backslashes may stand between the characters, in a quoted command or a repr.
        pattern = "".join(rf"\\*{re.escape(character)}" for character in secret)
        text = re.sub(pattern, HIDDEN, text)
    return ASSIGNMENT.sub(rf"\1={HIDDEN}", LOGIN.sub(HIDDEN, text))


def _environment_secrets() -> list[str]:
    """Return the values of the environment variables that are named like secrets."""
    secrets = []
    for name, value in os.environ.items():
        if SECRET_VARIABLE.search(name) and len(value) >= SHORTEST:
            secrets.append(value)
    return secrets
