"""What a person types to what Hydra reads: values that may hold any character are quoted before Hydra parses them."""

import re
from collections.abc import Iterable

FREE_TEXT = {
    "prompt",
    "negative_prompt",
    "prompt_file",
    "checkpoint",
    "output",
    "name",
    "hydra.run.dir",
    "hydra.sweep.dir",
    "hydra.launcher.prefix",
}
FREE_TEXT_ENDS = (".path", ".font", ".tokenizer")
TAKE_A_VALUE = {
    "--cfg",
    "-c",
    "--package",
    "-p",
    "--config-path",
    "-cp",
    "--config-name",
    "-cn",
    "--config-dir",
    "-cd",
    "--experimental-rerun",
}
GROUP_OF_KEY = {"metrics": "metric"}
"""Keys that a user sets like a value, and the group whose options they choose."""
QUOTED = re.compile(r"""\s*('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")\s*""", re.DOTALL)
QUOTED_LIST = re.compile(rf"\s*\[({QUOTED.pattern},)*{QUOTED.pattern}\]\s*", re.DOTALL)


def quoted(value: str) -> str:
    """`value` as a Hydra string: nothing in it is read as syntax, not even ${...}."""
    value = re.sub(
        r"(\\*)'", lambda m: m[1] * 2 + r"\'", value
    )  # a quote, and the backslashes that run into it
    value = re.sub(r"(\\+)\Z", lambda m: m[1] * 2, value)
    value = re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + r"\${", value)  # OmegaConf's own escape
    return f"'{value}'"


def is_free_text(key: str) -> bool:
    return key in FREE_TEXT or key.endswith(FREE_TEXT_ENDS)


def is_file_of(key: str, value: str) -> bool:
    """Whether a table was given by the name of its file, and not as a list."""
    return key in ("schedule.betas", "schedule.alphas_cumprod") and not value.lstrip().startswith(
        ("[", "'", '"')
    )


def is_sweep(arguments: list[str]) -> bool:
    """Whether several runs are asked for."""
    return (
        "-m" in arguments
        or "--multirun" in arguments
        or any(re.fullmatch(r"[+]*sweep=(?!(null|none)$).*", word) for word in arguments)
    )


def prepared(arguments: list[str], repeatable: str | None = None) -> list[str]:
    """The command line for Hydra.

    Flags come first, because argparse wants all overrides in one block. Free text is quoted, unless it is quoted already or refers to
    another key by ${...} in a folder name. `repeatable` may be given several times and becomes a list.
    """
    flags, words = [], []
    for place, argument in enumerate(arguments):
        is_flag = argument.startswith("-") or (place > 0 and arguments[place - 1] in TAKE_A_VALUE)
        (flags if is_flag else words).append(argument)
    sweep = "-m" in flags or "--multirun" in flags
    rest, several = [], []
    for argument in words:
        key, equals, value = argument.partition("=")
        name = key.lstrip("+")
        if (
            not equals
            or not (is_free_text(name) or is_file_of(name, value))
            or value in ("", "null")
        ):
            pass
        elif QUOTED.fullmatch(value) or QUOTED_LIST.fullmatch(value):
            value = value.strip()
        elif not (name.startswith("hydra.") and "${" in value) and not (
            sweep and "," in value and not name.startswith("hydra.")
        ):
            value = quoted(value)
        if name == repeatable and equals:
            several += [value] if value != "null" else []
        else:
            rest.append(f"{key}{equals}{value}")
    if repeatable and several:
        items = [
            item.strip()[1:-1] if QUOTED_LIST.fullmatch(item) else item or "''" for item in several
        ]
        rest.append(f"{repeatable}=[{','.join(items)}]")
    return flags + rest


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


def group_choice(argument: str) -> str:
    """The word that Hydra reads as a choice of options, for one that names the key: metrics=a becomes metric=[a].

    Any other word is returned as it is. A comma outside of brackets stays, as alternatives to sweep over.
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
