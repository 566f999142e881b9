"""Convert the arguments that a person types to those that Hydra reads.

Values that may contain any character are quoted before Hydra parses them.
"""

import re
from collections.abc import Collection, Iterable, Sequence

from sdtrain.config.conditions import is_condition_list, split_conditions
from sdtrain.config.flags import MULTIRUN, Flag, flag_words, read_flags, refuse_rerun
from sdtrain.config.path_keys import expand_homes, is_path

FREE_TEXT = {
    "adapter.word",
    "adapter.initial",
    "prompt",
    "negative_prompt",
    "name",
    "logger.notes",
    "hydra.launcher.prefix",
    "data.caption_template",
    "data.prior_prompt",
}
"""Keys that hold text, in addition to the keys of paths."""
TABLES = ("schedule.betas", "schedule.alphas_cumprod")
"""Keys that hold the name of a file or a list."""
GROUP_OF_KEY = {"metrics": "metric"}
"""Keys that a user sets like a value, and the config group whose options they choose."""
IS_MULTIRUN = re.compile(r"[+]*hydra[.]mode=['\"]?MULTIRUN['\"]?", re.IGNORECASE)
IS_SWEEP = re.compile(r"[+]*sweep=(?!(null|none)$).*", re.DOTALL)
QUOTED = re.compile(r"""\s*('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")\s*""", re.DOTALL)
QUOTED_LIST = re.compile(rf"\s*\[({QUOTED.pattern},)*{QUOTED.pattern}\]\s*", re.DOTALL)


def quoted(value: str) -> str:
    """Return `value` as a quoted Hydra string, in which nothing is syntax, not even ${...}."""
    # Escape quotes, and double the backslashes directly before them.
    value = re.sub(r"(\\*)'", lambda match: match[1] * 2 + r"\'", value)
    value = re.sub(r"(\\+)\Z", lambda match: match[1] * 2, value)
    # Escape references in OmegaConf's own way.
    value = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
    return f"'{value}'"


def text_override(key: str, value: str) -> str:
    """Return the override that sets a key of free text, as a user would type it.

    The value is quoted only if it would be misread without quotes.
    """
    is_plain = _quote_free_text(key, value, is_multirun=False) == quoted(value)
    return f"{key}={value if is_plain else quoted(value)}"


def is_free_text(key: str) -> bool:
    """Whether the value of a key is text that may contain any character."""
    return key in FREE_TEXT or is_path(key) and key not in TABLES


def is_table_file(key: str, value: str) -> bool:
    """Return whether `key=value` gives a table of betas as a file name, and not as a list."""
    is_list = value.lstrip().startswith(("[", "'", '"'))
    return key in TABLES and not is_list


def is_sweep(arguments: Sequence[str]) -> bool:
    """Whether the command line starts several runs."""
    flags, words = read_flags(arguments)
    return _is_multirun(flags, words) or _any_matches(IS_SWEEP, words)


def _is_multirun(flags: Iterable[Flag], words: Iterable[str]) -> bool:
    if any(flag.name == MULTIRUN for flag in flags):
        return True
    return _any_matches(IS_MULTIRUN, words)


def _any_matches(pattern: re.Pattern, words: Iterable[str]) -> bool:
    return any(pattern.fullmatch(word) for word in words)


def prepare_arguments(arguments: list[str], repeatable: Collection[str] = ()) -> list[str]:
    """Return the command line that Hydra reads.

    * Flags come first, each in one form, because argparse wants all overrides in one block.
    * A ~ at the beginning of a path is expanded.
    * Free text is quoted, unless it is quoted already or, in the name of a folder, refers to
      another key by ${...}.
    * The values of a key in `repeatable`, which may be set several times, become a list.
    * A list of conditions is divided among two groups, see `split_conditions`.
    """
    flags, words = read_flags(arguments)
    refuse_rerun(flags)
    is_multirun = _is_multirun(flags, words)
    words = expand_homes(words, allow_lists=is_multirun)
    others = []
    repeated: dict[str, list[str]] = {}
    for argument in words:
        key, equals, value = argument.partition("=")
        if equals:
            value = _quote_free_text(key.lstrip("+"), value, is_multirun)
        if is_condition_list(key, value):
            others += split_conditions(value, words)
        elif equals and key.lstrip("+") in repeatable:
            values = repeated.setdefault(key.lstrip("+"), [])
            if value != "null":
                values.append(value)
        else:
            others.append(f"{key}{equals}{value}")
    for key, values in repeated.items():
        if values:
            items = ",".join(_list_items(value) for value in values)
            others.append(f"{key}=[{items}]")
    return flag_words(flags) + others


def _quote_free_text(key: str, value: str, is_multirun: bool) -> str:
    """Return the value of a key as Hydra should read it."""
    is_text = is_free_text(key) or is_table_file(key, value)
    if not is_text or value in ("", "null"):
        return value
    if QUOTED.fullmatch(value) or QUOTED_LIST.fullmatch(value):
        return value.strip()
    is_folder = key.startswith("hydra.")
    refers_to_a_key = is_folder and "${" in value
    is_list_of_values = is_multirun and not is_folder and "," in value
    return value if refers_to_a_key or is_list_of_values else quoted(value)


def _list_items(value: str) -> str:
    """Return a value as items of a list: a list without its brackets, the empty text as ''."""
    if QUOTED_LIST.fullmatch(value):
        return value.strip()[1:-1]
    return value or "''"


def typed_keys(overrides: Iterable[str]) -> set[str]:
    """Return the keys and groups that the overrides set."""
    keys = set()
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        keys.add(key.partition("@")[0])
    return keys


def typed_values(arguments: Iterable[str]) -> dict[str, str]:
    """Return {key: value as it was typed} of the arguments key=value; the keys without a +."""
    values = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals:
            values[key.lstrip("+")] = value
    return values


def add_data_key(argument: str) -> str:
    """Return an override of the run's data set, such as data.path=FOLDER, with ++ before it.

    It may so add a key: those of the data set are known only after the run is read. data=NAME,
    which names the data for a pipeline, becomes ++data.option=NAME. Any other argument is returned
    as it is.
    """
    if argument.startswith("data="):
        argument = argument.replace("data=", "data.option=", 1)
    return f"++{argument}" if argument.startswith("data.") else argument


def choose_options(argument: str) -> str:
    """Convert an override of a key that a config group fills to the choice of that group.

    metrics=a becomes metric=[a]: the key is `metrics`, its group `metric`. A comma outside of
    brackets separates the values of a sweep and stays. Any other argument is returned as it is.
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
    unique = dict.fromkeys(name.strip() for name in names.split(","))  # Hydra refuses duplicates
    return f"{group}=[{','.join(unique)}]"


def find_repeated_option(override: str) -> tuple[str, str | None]:
    """Return the key of an override and the item that its list contains twice, or None."""
    key, _, value = override.partition("=")
    key = key.lstrip("+")
    for items in re.findall(r"\[([^\[\]]*)\]", value):
        seen = set()
        for item in items.split(","):
            name = item.strip(" '\"")
            if name in seen:
                return key, name
            if name:
                seen.add(name)
    return key, None
