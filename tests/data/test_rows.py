"""The rows of a split, as columns and one by one."""

import pickle

import numpy as np

from sdtrain.data.rows import PictureRow, Rows, rows_table

ALL = [
    PictureRow("a.png", ("x", "y"), (40, 30), 1, 2.5),
    PictureRow("b.png", ("",), (50, 60)),
    PictureRow("b.png", ("日本",), (50, 60), 3),
    PictureRow("c.png", ("z",), (7, 8), 2, 0.0),
]


def some(*indices, rows=ALL):
    return Rows(rows_table(rows), np.array(indices, np.int64))


def test_rows_and_columns_agree():
    chosen = some(3, 0, 2)
    assert [chosen[index].name for index in range(3)] == chosen.names == ["c.png", "a.png", "b.png"]
    assert chosen[1] == ("a.png", ["x", "y"], (40, 30), 1, 2.5)
    assert chosen[2] == ("b.png", ["日本"], (50, 60), 3, None)
    assert chosen.captions == ["z", "x", "y", "日本"]
    assert chosen.caption_count == 4
    assert chosen.labels == [2, 1, 3]
    assert chosen.sizes.tolist() == [[7, 8], [40, 30], [50, 60]]
    assert chosen.weights.tolist() == [0.0, 2.5, 1.0]
    assert some(1, 2).weights is None
    assert some(1, 2).distinct_names == 1
    assert pickle.loads(pickle.dumps(chosen))[1] == chosen[1]


def test_spread_captions_are_first_ones_and_empty_only_without_others():
    assert some(0, 1, 2, 3).spread_captions(3) == ["x", "日本", "z"]
    assert some(0, 1, 2, 3).spread_captions(6) == ["x", "x", "日本", "日本", "z", "z"]
    assert some(1).spread_captions(2) == ["", ""]
