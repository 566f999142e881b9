"""Two pictures to train on and one held out: every number is one that can be read, and what is used
of what was asked for is said.
"""

import json
import math

import pytest


@pytest.fixture(scope="module")
def small_run(train_tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    few = ["data.size=2", "data.validation_size=1", "data.batch_size=2", "trainer.max_images=4"]
    looks = ["callbacks.noise_levels.every=4", "callbacks.samples.every=0", "validation.every=4"]
    result = train_tiny(folder / "run", *few, *looks)
    assert result.code == 0, result.err
    return folder / "run", result


def finite(numbers):
    for value in numbers.values():
        if isinstance(value, dict):
            finite(value)
        elif isinstance(value, float):
            assert math.isfinite(value), numbers


def test_one_held_out_picture_has_no_standard_error(small_run):
    run, result = small_run
    told = " ".join(result.out.split())
    assert "callbacks.noise_levels.num_images=256: the data hold out 1" in told
    assert "no standard error" in told
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        finite(line)
    keys = set().union(*lines)
    assert "validation/bits_per_dim" in keys and "validation/bits_per_dim_error" not in keys


def test_chance_of_two_pictures_is_a_share(here, small_run, tmp_path):
    run, _ = small_run
    words = ["metrics=retrieval", "num_images=4", "steps=2", f"output={tmp_path}/out"]
    result = here("sdtrain-evaluate", f"checkpoint={run}", *words)
    assert result.code == 0, result.err
    assert "num_images=4" in result.err and "2 training pictures" in result.err
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())["retrieval"]
    assert found["chance"] == {"top_1": 0.5, "top_5": 1.0}
    assert all(0 <= value <= 1 for value in found["measured"].values())
