"""Keys that hold a path, and the expansion of a ~ at its beginning to a home folder, as in a shell.

It applies to overrides, because no shell expands a ~ after a =, and to yaml files.
"""

import re
from collections.abc import Iterable
from typing import Any

from sdtrain.paths import expand_home

PATH_KEYS = {
    "prompt_file",
    "init_image",
    "depth",
    "mask",
    "checkpoint",
    "output",
    "autoencoder",
    "data.cache",
    "data.depth",
    "data.depth_model",
    "data.prior",
    "depth_model",
    "embedding",
    "lora",
    "schedule.betas",
    "schedule.alphas_cumprod",
    "hydra.run.dir",
    "hydra.sweep.dir",
}
PATH_SUFFIXES = (".path", ".font", ".tokenizer", ".pretrained", ".architecture", ".weights")

SEARCH_PATH = "hydra.searchpath"
"""A list of folders, such as [file://FOLDER,FOLDER]."""

HOME_IN_PATH = re.compile(r"""^(\s*['"]?)(~[^/'"]*)""")
HOME_IN_LIST = re.compile(r"""(?:^|(?<=,))(\s*\[?\s*['"]?(?:file://)?)(~[^/,'"\]]*)""")
"""A ~ at the beginning of a path, or of any path in a list; with or without quotes."""


def is_path(key: str) -> bool:
    """Whether the value of a key is a path."""
    return key in PATH_KEYS or key.endswith(PATH_SUFFIXES)


def expand_homes(words: Iterable[str], *, allow_lists: bool) -> list[str]:
    """Expand every ~ at the beginning of a path in the words of a command line, without its flags.

    allow_lists: whether a comma separates two paths, as it does in a sweep, or belongs to the path.
    """
    expanded_words = []
    for word in words:
        key, equals, value = word.partition("=")
        name = key.lstrip("+")
        if equals and name == SEARCH_PATH:
            word = f"{key}={_expand_matches(HOME_IN_LIST, value)}"
        elif equals and is_path(name):
            is_list = allow_lists and not key.startswith("hydra.")
            pattern = HOME_IN_LIST if is_list else HOME_IN_PATH
            word = f"{key}={_expand_matches(pattern, value)}"
        expanded_words.append(word)
    return expanded_words


def _expand_matches(pattern: re.Pattern, value: str) -> str:
    return pattern.sub(lambda match: f"{match[1]}{expand_home(match[2])}", value)


def expand_homes_in_config(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a copy of a configuration with every ~ at the beginning of a path expanded."""
    copy = {}
    for name, value in node.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            copy[name] = expand_homes_in_config(value, f"{key}.")
        elif isinstance(value, str) and is_path(key):
            copy[name] = expand_home(value)
        elif isinstance(value, list) and is_path(key):
            copy[name] = [expand_home(each) if isinstance(each, str) else each for each in value]
        else:
            copy[name] = value
    return copy
