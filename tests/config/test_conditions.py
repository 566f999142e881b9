"""Lists of conditions on the command line."""

import pytest

from sdtrain.config.overrides import prepare_arguments
from sdtrain.errors import UserError


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("[text,depth]", ["model/channels=[depth]", "model/conditioner=text"]),
        ("[ depth , class_label ]", ["model/channels=[depth]", "model/conditioner=class_label"]),
        ("[depth]", ["model/channels=[depth]", "model/conditioner=none"]),
        ("[depth,inpainting]", ["model/channels=[depth,inpainting]", "model/conditioner=none"]),
        ("[text]", ["model/channels=[]", "model/conditioner=text"]),
        ("text", ["model/conditioner=text"]),
    ],
)
def test_a_list_is_divided_among_two_groups(typed, expected):
    assert prepare_arguments([f"model/conditioner={typed}", "seed=1"]) == [*expected, "seed=1"]


def test_a_model_with_a_text_encoder_keeps_it():
    words = ["model=stable_diffusion", "model/conditioner=[text,depth]"]
    assert prepare_arguments(words) == ["model=stable_diffusion", "model/channels=[depth]"]


@pytest.mark.parametrize(
    "words",
    [
        ["model/conditioner=[text,text]"],
        ["model/conditioner=[text,class_label]"],
        ["model/conditioner=[text,depth]", "model/channels=[inpainting]"],
        ["-m", "model/conditioner=[text,depth],[text]"],
    ],
)
def test_a_list_that_cannot_be_divided_is_refused(words):
    with pytest.raises(UserError) as caught:
        prepare_arguments(words)
    assert caught.value.key == "model/conditioner"
    assert caught.value.remedy or "twice" in str(caught.value)
