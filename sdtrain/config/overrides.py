"""What a person types to what Hydra reads: values that may hold any character are quoted before
Hydra parses them.
"""

import re
from collections.abc import Iterable, Sequence

from sdtrain.config.flags import MULTIRUN, Flag, read_flags, refuse_rerun
from sdtrain.config.path_keys import is_path, with_homes

FREE_TEXT = {"prompt", "negative_prompt", "name", "logger.notes", "hydra.launcher.prefix"}
"""Keys of text, beside those of paths."""
TABLES = ("schedule.betas", "schedule.alphas_cumprod")
"""Keys that take a file or a list."""
GROUP_OF_KEY = {"metrics": "metric"}
"""Keys that a user sets like a value, and the group whose options they choose."""
IS_MULTIRUN = re.compile(r"[+]*hydra[.]mode=['\"]?MULTIRUN['\"]?", re.IGNORECASE)
IS_SWEEP = re.compile(r"[+]*sweep=(?!(null|none)$).*", re.DOTALL)
QUOTED = re.compile(r"""\s*('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")\s*""", re.DOTALL)
QUOTED_LIST = re.compile(rf"\s*\[({QUOTED.pattern},)*{QUOTED.pattern}\]\s*", re.DOTALL)


def quoted(value: str) -> str:
    """`value` as a Hydra string: nothing in it is read as syntax, not even ${...}."""
    # A quote, and the backslashes that run into it.
    value = re.sub(r"(\\*)'", lambda match: match[1] * 2 + r"\'", value)
    value = re.sub(r"(\\+)\Z", lambda match: match[1] * 2, value)
    # OmegaConf's own escape.
    value = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
    return f"'{value}'"


def text_word(key: str, value: str) -> str:
    """The word that sets a key of free text to `value`, as a user would type it: quoted only where
    the text would be taken for something else.
    """
    is_plain = _quoted_if_text(key, value, is_multirun=False) == quoted(value)
    return f"{key}={value if is_plain else quoted(value)}"


def is_free_text(key: str) -> bool:
    """Whether the value of a key is text that may hold any character."""
    return key in FREE_TEXT or is_path(key) and key not in TABLES


def is_table_file(key: str, value: str) -> bool:
    """Whether a table of betas was given by the name of its file, and not as a list."""
    is_list = value.lstrip().startswith(("[", "'", '"'))
    return key in TABLES and not is_list


def is_sweep(arguments: Sequence[str]) -> bool:
    """Whether the words ask for several runs."""
    flags, words = read_flags(arguments)
    return _is_multirun(flags, words) or any(IS_SWEEP.fullmatch(word) for word in words)


def _is_multirun(flags: Iterable[Flag], words: Iterable[str]) -> bool:
    typed = any(flag.name == MULTIRUN for flag in flags)
    return typed or any(IS_MULTIRUN.fullmatch(word) for word in words)


def prepared(arguments: list[str], repeatable: str | None = None) -> list[str]:
    """The command line for Hydra.

    Flags come first, because argparse wants all overrides in one block, and each in one form. A ~
    that begins a path is expanded. Free text is quoted, unless it is quoted already or refers to
    another key by ${...} in a folder name. `repeatable` may be given several times and becomes a
    list.
    """
    flags, words = read_flags(arguments)
    refuse_rerun(flags)
    is_multirun = _is_multirun(flags, words)
    words = with_homes(words, are_several=is_multirun)
    once = []
    repeated = []
    for argument in words:
        key, equals, value = argument.partition("=")
        if equals:
            value = _quoted_if_text(key.lstrip("+"), value, is_multirun)
        if equals and key.lstrip("+") == repeatable:
            if value != "null":
                repeated.append(value)
        else:
            once.append(f"{key}{equals}{value}")
    if repeated:
        once.append(f"{repeatable}=[{','.join(_list_items(value) for value in repeated)}]")
    return [flag.word for flag in flags] + once


def _quoted_if_text(name: str, value: str, is_multirun: bool) -> str:
    """The value as Hydra is to see it."""
    is_text = is_free_text(name) or is_table_file(name, value)
    if not is_text or value in ("", "null"):
        return value
    if QUOTED.fullmatch(value) or QUOTED_LIST.fullmatch(value):
        return value.strip()
    is_folder = name.startswith("hydra.")
    refers_to_a_key = is_folder and "${" in value
    is_list_of_values = is_multirun and not is_folder and "," in value
    return value if refers_to_a_key or is_list_of_values else quoted(value)


def _list_items(value: str) -> str:
    """A value as items of a list: a list without its brackets, nothing as the empty text."""
    if QUOTED_LIST.fullmatch(value):
        return value.strip()[1:-1]
    return value or "''"


def typed_keys(overrides: Iterable[str]) -> set[str]:
    """The keys and groups that overrides set."""
    return {override.partition("=")[0].lstrip("+~").partition("@")[0] for override in overrides}


def typed_values(arguments: Iterable[str]) -> dict[str, str]:
    """{key: value} of the words that set a key, as they were typed."""
    values = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals:
            values[key.lstrip("+")] = value
    return values


def data_change(argument: str) -> str:
    """The word that Hydra reads as a new key, for one that changes an argument of a run's data set,
    as data.path=FOLDER: which there are is known once the run is read.
    """
    return f"++{argument}" if argument.startswith("data.") else argument


def group_choice(argument: str) -> str:
    """The word that Hydra reads as a choice of options, for one that names the key.

    metrics=a becomes metric=[a]; any other word is returned as it is. A comma outside of brackets
    stays, as alternatives to sweep over.
    """
    key, equals, value = argument.partition("=")
    if not equals or key not in GROUP_OF_KEY:
        return argument
    group = GROUP_OF_KEY[key]
    value = value.strip()
    if value in ("", "null"):
        return f"{group}=[]"
    is_list = value.startswith("[") and value.endswith("]")
    if "," in value and not is_list:
        return f"{group}={value}"
    names = value[1:-1] if is_list else value
    once = dict.fromkeys(name.strip() for name in names.split(","))  # Hydra takes none twice
    return f"{group}=[{','.join(once)}]"


def repeated_choice(word: str) -> tuple[str, str | None]:
    """(the key, what stands twice in a list of its values, or None)."""
    key, _, value = word.partition("=")
    for inside in re.findall(r"\[([^\[\]]*)\]", value):
        names = [name.strip(" '\"") for name in inside.split(",")]
        for name in names:
            if name and names.count(name) > 1:
                return key.lstrip("+"), name
    return key.lstrip("+"), None
