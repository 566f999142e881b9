"""How many pictures are held out, and which."""

import pytest

from sdtrain.data.split import hold_out, hold_out_count


@pytest.mark.parametrize(
    ("pictures", "held_out"),
    [(2, 1), (3, 1), (8, 2), (100, 25), (256, 64), (1000, 64), (1280, 64), (10000, 500)],
)
def test_hold_out_count(pictures, held_out):
    assert hold_out_count(pictures, 0.05) == held_out
    assert len(hold_out([str(i) for i in range(pictures)], 0.05, 0)) == held_out


def test_hold_out_moves_few_and_follows_the_seed():
    names = [f"{i}.png" for i in range(1000)]
    before = hold_out(names, 0.1, 0)
    assert before == hold_out(names[::-1] + names[:10], 0.1, 0)
    assert len(before ^ hold_out([*names, "new.png"], 0.1, 0)) <= 2
    assert len(before & hold_out(names, 0.1, 1)) < 30  # 10 of 100 by chance
