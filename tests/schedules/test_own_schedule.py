"""A schedule of one's own is one file and one yaml: it trains, is audited and drawn with, and no
edit in sdtrain.
"""

import json
import math

import pytest

SCHEDULE = '''"""log_snr falls linearly in t."""

from sdtrain.schedules.schedule import Schedule


def straight_line(*, start: float = 8.0, end: float = -8.0, num_timesteps: int = 1000) -> Schedule:
    """log_snr = start + (end - start) t."""
    fall = end - start
    return Schedule(
        "straight_line",
        lambda t: start + fall * t,
        lambda log_snr: (log_snr - start) / fall,
        num_timesteps=num_timesteps,
    )
'''
YAML = """\
_target_: schedule_of_mine.straight_line
start: 6.0
end: -7.0
num_timesteps: 1000
"""


@pytest.fixture
def own(own_part):
    """The words that choose the schedule."""
    found = own_part("schedule/straight_line", "schedule_of_mine", SCHEDULE, YAML)
    return [found, "schedule=straight_line"]


def test_a_schedule_of_ones_own_trains_and_draws(here, tiny, tmp_path, own):
    run = tmp_path / "run"
    looks = [
        "callbacks.noise_levels.every=64",
        "callbacks.noise_levels.num_images=4",
        "callbacks.samples.every=0",
        "validation.every=0",
    ]
    result = here("sdtrain", *tiny(*own, *looks), f"hydra.run.dir={run}")
    assert result.code == 0, result.err
    measured = json.loads((run / "validation" / "000000000064.json").read_text())
    reached = [
        x for x, inside in zip(measured["log_snr"], measured["inside"], strict=True) if inside
    ]
    assert (min(reached), max(reached)) == (-7, 6)  # the yaml's numbers, not the function's
    sample = ["sdtrain-sample", f"checkpoint={run}", "prompt=a red star", "num_images=1", "steps=2"]
    sample += ["accelerator=cpu", f"output={tmp_path}/out"]
    assert here(*sample).code == 2  # it is not trusted yet
    result = here(*sample, "allow=[schedule_of_mine]")
    assert result.code == 0, result.err
    assert (tmp_path / "out" / "grid.png").exists()


def test_a_schedule_of_ones_own_is_audited(here, tmp_path, own):
    result = here("sdtrain-schedule", *own, "weighting=simple", f"output={tmp_path}/audit")
    assert result.code == 0, result.err
    (record,) = json.loads((tmp_path / "audit" / "schedules.json").read_text())
    assert "No effect" not in result.out  # the searchpath is where the schedule was found
    assert record["log_snr_at_0"] == 6.0
    assert record["log_snr_at_1"] == -7.0
    assert record["terminal_snr"] == pytest.approx(math.exp(-7.0))
