"""A schedule of one's own is one file and one yaml: it trains, is audited and drawn with, and no
edit in sdtrain.
"""

import math

import pytest
from reading import BARE, newest

from sdtrain.assemble.load import load
from sdtrain.audit.entries import make_entries
from sdtrain.audit.request import read_request
from sdtrain.errors import UserError
from sdtrain.runs.layout import CheckpointFolder

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
    words = tiny(*own, *BARE, "trainer.max_images=8")
    result = here("sdtrain", *words, f"hydra.run.dir={run}")
    assert result.code == 0, result.err
    sample = ["sdtrain-sample", f"checkpoint={run}", "prompt=a red star", "num_images=1", "steps=2"]
    sample += ["accelerator=cpu", "ema=false", f"output={tmp_path}/out"]
    checkpoint = CheckpointFolder(newest(run))
    with pytest.raises(UserError):  # it is not trusted yet
        load(checkpoint, ema=False, device="cpu", allow=[], autoencoder=None)
    result = here(*sample, "allow=[schedule_of_mine]")
    assert result.code == 0, result.err
    assert (tmp_path / "out" / "grid.png").exists()


def test_a_schedule_of_ones_own_is_audited(own):
    request = read_request([*own, "weighting=simple"])
    assert request.ignored_keys == []  # the searchpath is where the schedule was found
    (entry,) = make_entries(request.combinations)
    record = entry.record()
    assert record["log_snr_at_0"] == 6.0  # the yaml's numbers, not the function's
    assert record["log_snr_at_1"] == -7.0
    assert record["terminal_snr"] == pytest.approx(math.exp(-7.0))
