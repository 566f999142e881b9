"""What the arms of a sweep are called."""

import pytest

from sdtrain.sweep.names import name_arms

LONG_KEYS = (
    "model.unet.norm_groups",
    "callbacks.noise_levels.num_images",
    "lr_schedule.warmup_images",
)


@pytest.mark.parametrize(
    ("jobs", "names"),
    [
        (
            [["schedule=linear", "seed=0"], ["schedule=cosine", "seed=0"]],
            ["schedule=linear", "schedule=cosine"],
        ),
        (
            [["schedule=linear", "+x=1"], ["schedule=cosine", "+x=2"]],
            ["schedule=linear,x=1", "schedule=cosine,x=2"],
        ),
        ([["prompt='a/b c'"], ["prompt='a/b d'"]], ["prompt=a_b_c", "prompt=a_b_d"]),
        ([["a='x y'"], ["a='x/y'"]], ["0_a=x_y", "1_a=x_y"]),
        ([["schedule=linear"]], ["0"]),
        ([["a=" + "x" * 200], ["a=" + "y" * 200]], ["0_a=" + "x" * 78, "1_a=" + "y" * 78]),
        (
            [[f"{key}={value}" for key in LONG_KEYS] for value in (8, 9)],
            [f"norm_groups={i},num_images={i},warmup_images={i}" for i in (8, 9)],
        ),
        ([["modifiers=[]"], ["modifiers=[shift]"]], ["modifiers=", "modifiers=shift"]),
    ],
)
def test_arms_are_named_by_the_words_in_which_they_differ(jobs, names):
    assert name_arms(jobs) == names


def test_numbers_of_arms_begin_where_hydra_begins():
    assert name_arms([["a='x y'"], ["a='x/y'"]], first_number=5) == ["5_a=x_y", "6_a=x_y"]
