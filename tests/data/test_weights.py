"""A column of weights: how often each picture is visited, and what is refused."""

import json
from collections import Counter

import pytest
from PIL import Image

from sdtrain.data.images import Images
from sdtrain.data.order import Stream
from sdtrain.errors import DataError

NAMES = [f"{i}.png" for i in range(8)]


@pytest.fixture
def folder(tmp_path):
    """weighted(WEIGHTS): a folder of eight pictures with these weights, read as a data set."""
    for i, name in enumerate(NAMES):
        Image.new("RGB", (36, 36), (i * 30, 0, 0)).save(tmp_path / name)

    def write(weights):
        rows = []
        for name, weight in zip(NAMES, weights, strict=True):
            row = {"file_name": name, "text": "x"}
            rows.append(row if weight == "none" else row | {"weight": weight})
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return Images(path=str(tmp_path))

    return write


def visits(split, passes):
    """How often each name is read by the training stream, over whole passes."""
    count = int(sum(split.weights)) * passes
    stream = iter(
        Stream(
            length=len(split), seed=0, start=0, size=count, rank=0, world=1, weights=split.weights
        )
    )
    return Counter(split.names[index] for index, _ in next(stream))


def test_a_count_is_so_many_visits(folder):
    data = folder([1, "2", 3, 0, 1, 5.0, 1, 2])
    split = data.split("train")
    found = visits(split, passes=3)
    expected = dict(zip(NAMES, [1, 2, 3, 0, 1, 5, 1, 2], strict=True))
    assert {name: found[name] for name in split.names} == {
        name: 3 * expected[name] for name in split.names
    }
    assert len(data.split("validation")) == 2
    assert any("weights, which range from" in note for note in data.notes)


def test_equal_weights_are_no_range(folder):
    notes = [note for note in folder([2] * 8).notes if "weight" in note]
    assert len(notes) == 1 and " from " not in notes[0]


def test_weights_are_part_of_the_hash(folder):
    hashes = {folder(weights).sha256 for weights in (["none"] * 8, [1] * 8, [1, 2] * 4, [2, 1] * 4)}
    assert len(hashes) == 4


@pytest.mark.parametrize(
    "wrong",
    [-1, "none", None, "", float("nan"), float("inf"), "many", True, [1], 10**400, 1e300],
)
def test_weights_that_are_refused(folder, wrong):
    with pytest.raises(DataError) as refused:
        folder([1, 1, wrong, 1, 1, 1, 1, 1])
    assert refused.value.key == "data.path"
    if wrong != 1e300:
        assert "2.png" in str(refused.value)
        assert "metadata.jsonl" in str(refused.value)


def test_all_zero_is_refused(folder):
    with pytest.raises(DataError) as refused:
        folder([0] * 8)
    assert refused.value.key == "data.path"
