"""What a run writes and says holds no secret of its environment."""

import os
import re
from typing import Any

NAME = re.compile("KEY|TOKEN|SECRET|PASSW|CREDENTIAL|_PAT$", re.IGNORECASE)
TYPED = r"(?:\w*[._-])?(?:api_?key|access_?key|token|secret|password|passwd|credentials?)"  # names of keys and of a URL's parameters
LOGIN = re.compile(r"(?<=://)[^\s/@:]*:[^\s/@]+(?=@)")  # user:password in a URL
ASSIGNED = re.compile(rf"(?<![\w])({TYPED})=([^\s&'\"]+)", re.IGNORECASE)
SHORTEST = 8  # a shorter value may be a word of anybody's


def redacted(node: Any) -> Any:
    """Nested dicts, lists and strings, in which *** stands for what is named like a secret, as a key, a URL's parameter or a variable of the
    environment, and for logins in URLs. What is to be built, _target_, is no secret."""
    if isinstance(node, dict):
        hidden = {
            key
            for key, value in node.items()
            if isinstance(value, str) and re.fullmatch(TYPED, str(key), re.IGNORECASE)
        }
        return {
            key: "***" if key in hidden else value if key == "_target_" else redacted(value)
            for key, value in node.items()
        }
    if isinstance(node, list):
        return [redacted(value) for value in node]
    if not isinstance(node, str):
        return node
    secrets = (
        value for name, value in os.environ.items() if NAME.search(name) and len(value) >= SHORTEST
    )
    for secret in sorted(secrets, key=len, reverse=True):
        node = re.sub(
            "".join(rf"\\*{re.escape(c)}" for c in secret), "***", node
        )  # a quoted command and a repr put backslashes in
    return ASSIGNED.sub(r"\1=***", LOGIN.sub("***", node))
