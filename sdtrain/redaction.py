"""What a run writes and says holds no secret of its environment."""

import os
import re
from typing import Any

NAME = re.compile("KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)
LOGIN = re.compile(r"(?<=://)[^\s/@:]*:[^\s/@]+(?=@)")  # user:password in a URL
SHORTEST = 8  # a shorter value may be a word of anybody's


def redacted(node: Any) -> Any:
    """Nested dicts, lists and strings, in which *** stands for values of environment variables that are named like secrets, and for logins in URLs."""
    if isinstance(node, dict):
        return {key: redacted(value) for key, value in node.items()}
    if isinstance(node, list):
        return [redacted(value) for value in node]
    if not isinstance(node, str):
        return node
    secrets = (value for name, value in os.environ.items() if NAME.search(name) and len(value) >= SHORTEST)
    for secret in sorted(secrets, key=len, reverse=True):
        node = re.sub("".join(rf"\\*{re.escape(c)}" for c in secret), "***", node)  # a quoted command and a repr put backslashes in
    return LOGIN.sub("***", node)
