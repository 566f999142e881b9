"""A user's mistake keeps its parts, wherever it is reported."""

import pytest

from sdtrain.errors import DataError, DivergedError, StorageError, UserError, first_line


class OtherError(UserError):
    """Takes other arguments."""

    def __init__(self, problem: str, exit_code: int) -> None:
        super().__init__(problem)
        self.exit_code = exit_code


def test_within_keeps_what_a_subclass_adds():
    outer = OtherError("It broke", 70).with_prefix("Here")
    assert type(outer) is OtherError and outer.exit_code == 70
    assert str(outer) == "Here: It broke."


@pytest.mark.parametrize("kind", [UserError, DataError, DivergedError, StorageError])
def test_within_keeps_class_and_fields(kind):
    error = kind("must be odd", key="steps", value=2, allowed="1, 3", remedy="Add one.")
    outer = error.with_prefix("In the arm b").with_prefix("In the sweep")
    assert type(outer) is kind and outer.exit_code == kind.exit_code
    for name in ("problem", "key", "value", "has_value", "allowed", "remedy"):
        assert getattr(outer, name) == getattr(error, name)
    assert str(outer) == f"In the sweep: In the arm b: {error}"
    assert str(error) == "steps=2 must be odd. Allowed: 1, 3. Add one."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "ValueError"),
        ("one\ntwo", "one"),
        (
            "\n  of these weights:\n\tconv has another size\nand more",
            "of these weights: conv has another size",
        ),
        ("alone:", "alone:"),
    ],
)
def test_the_first_line_of_an_error_says_something(text, expected):
    assert first_line(ValueError(text)) == expected
