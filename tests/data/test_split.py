"""How many pictures are held out, and which."""

import pytest

from sdtrain.data.split import held_out_notes, hold_out, hold_out_count


@pytest.mark.parametrize(
    ("pictures", "held_out"),
    [(2, 1), (3, 1), (8, 2), (100, 25), (256, 64), (1000, 64), (1280, 64), (10000, 500)],
)
def test_hold_out_count(pictures, held_out):
    assert hold_out_count(pictures, 0.05) == held_out
    assert len(hold_out([str(i) for i in range(pictures)], 0.05, 0)) == held_out


@pytest.mark.parametrize(
    ("pictures", "said"), [(300, "64 of 300 pictures (21%)"), (100, "25 of 100 pictures (25%)")]
)
def test_another_share_than_was_set_is_told(pictures, said):
    (line,) = held_out_notes(pictures, 0.05)
    assert line.startswith(said) and "data.validation_fraction=0.05" in line
    assert held_out_notes(10000, 0.05) == []
    assert held_out_notes(pictures, hold_out_count(pictures, 0.05) / pictures) == []


def test_hold_out_moves_few_and_follows_the_seed():
    names = [f"{i}.png" for i in range(1000)]
    before = hold_out(names, 0.1, 0)
    assert before == hold_out(names[::-1] + names[:10], 0.1, 0)
    assert len(before ^ hold_out([*names, "new.png"], 0.1, 0)) <= 2
    assert len(before & hold_out(names, 0.1, 1)) < 30  # 10 of 100 by chance
