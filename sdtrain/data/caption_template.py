"""Captions that are made of several columns, such as "a photo of {label}, {style}"."""

import string
from collections.abc import Iterable, Mapping
from typing import Any

from sdtrain.errors import DataError, UserError

KEY = "data.caption_template"


class CaptionTemplate:
    """A text with the names of columns in braces; without any it is the caption of all pictures.

    Args:
        text: the template. `{{` stands for a brace.

    Raises UserError if it cannot be parsed, or is empty.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            # Only parsed, and not given to str.format, which would also read attributes.
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise _template_error(text, f"cannot be read: {error}") from error
        self._parts = []
        for literal, column, format_spec, conversion in parts:
            if format_spec or conversion:
                problem = f"has more than the name of a column in the braces of {column!r}"
                raise _template_error(text, problem)
            self._parts.append((literal, column))
        self.columns = list(dict.fromkeys(column for _, column in self._parts if column))
        """The columns that it names, in their order."""
        if not text.strip() or "" in [column for _, column in self._parts]:
            problem = (
                "must be a caption for all pictures, or have the names of columns in braces, as in "
                "'a photo of {label}'"
            )
            raise _template_error(text, problem)

    def check(self, existing: Iterable[str], place: str) -> None:
        """Raise DataError if one of its columns does not exist. place: where they should be."""
        existing = list(existing)
        missing = [column for column in self.columns if column not in existing]
        if missing:
            raise DataError(
                f"names the column {missing[0]}, but {place} has "
                f"{', '.join(existing) or 'no columns'}",
                key=KEY,
                value=self.text,
                remedy=f"Change {KEY}.",
            )

    def __call__(self, values: Mapping[str, Any]) -> str:
        """Return the caption of a picture, "" if one of the columns has no value for it.

        values: by column.
        """
        caption = ""
        for literal, column in self._parts:
            caption += literal
            if column:
                text = _as_text(values.get(column))
                if not text:
                    return ""
                caption += text
        return caption


def escaped(text: str) -> str:
    """Return the template that makes this text the caption of all pictures."""
    return text.replace("{", "{{").replace("}", "}}")


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return ", ".join(_as_text(each) for each in value)
    return " ".join(str(value).split())


def _template_error(text: str, problem: str) -> UserError:
    return UserError(problem, key=KEY, value=text, remedy=f"Change {KEY}.")
