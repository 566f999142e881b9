"""Keys whose value is a path. A ~ at its beginning is somebody's home, as in a shell: in words that
were typed, which no shell expands after a =, and in yaml files.
"""

import re
from collections.abc import Iterable
from typing import Any

from sdtrain.paths import expanded

PATH_KEYS = {
    "prompt_file",
    "checkpoint",
    "output",
    "autoencoder",
    "schedule.betas",
    "schedule.alphas_cumprod",
    "hydra.run.dir",
    "hydra.sweep.dir",
}
PATH_ENDS = (".path", ".font", ".tokenizer")

SEARCH_PATH = "hydra.searchpath"
"""A list of folders, as [file://FOLDER,FOLDER]."""

ONE = re.compile(r"""^(\s*['"]?)(~[^/'"]*)""")
SEVERAL = re.compile(r"""(?:^|(?<=,))(\s*\[?\s*['"]?(?:file://)?)(~[^/,'"\]]*)""")
"""Where a ~ begins a path, in quotes or not: the only one, or one of a list."""


def is_path(key: str) -> bool:
    """Whether the value of a key is a path."""
    return key in PATH_KEYS or key.endswith(PATH_ENDS)


def with_homes(words: Iterable[str], *, are_several: bool) -> list[str]:
    """The words of a command line but its flags, with every ~ that begins a path expanded.

    are_several: whether a comma stands between two paths, of a sweep, and not in a path.
    """
    found = []
    for word in words:
        key, equals, value = word.partition("=")
        name = key.lstrip("+")
        if equals and name == SEARCH_PATH:
            word = f"{key}={_expanded_at(SEVERAL, value)}"
        elif equals and is_path(name):
            in_list = are_several and not key.startswith("hydra.")
            word = f"{key}={_expanded_at(SEVERAL if in_list else ONE, value)}"
        found.append(word)
    return found


def _expanded_at(place: re.Pattern, value: str) -> str:
    return place.sub(lambda match: f"{match[1]}{expanded(match[2])}", value)


def with_homes_in(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A copy of a configuration with every ~ that begins a path expanded."""
    copy = {}
    for name, value in node.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            copy[name] = with_homes_in(value, f"{key}.")
        elif isinstance(value, str) and is_path(key):
            copy[name] = expanded(value)
        else:
            copy[name] = value
    return copy
