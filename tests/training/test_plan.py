"""What a plan makes of a configuration, beside checking it."""

import pytest
import yaml

from sdtrain.config.compose import compose_config
from sdtrain.config.precheck import precheck_config
from sdtrain.training.parts import saved_config
from sdtrain.training.plan import make_plan


def planned(*words: str):
    return make_plan(precheck_config(compose_config("train", list(words)), words))


def warm_up(plan) -> int:
    """As config.yaml has it."""
    return yaml.safe_load(saved_config(plan))["lr_schedule"]["warmup_images"]


@pytest.mark.parametrize("experiment", ["shapes", "shapes_autoencoder"])
def test_a_warm_up_is_at_most_a_tenth_of_the_run(experiment):
    short = [f"experiment={experiment}", "trainer.max_images=320"]
    plan = planned(*short)
    assert warm_up(plan) == 32
    assert any("lr_schedule.warmup_images=32 is used" in note for note in plan.notes)
    assert plan.optimisation().lr_schedule(32, 320) == 1
    assert warm_up(planned(f"experiment={experiment}", "trainer.max_images=30000")) == 3000
    long = planned(f"experiment={experiment}", "trainer.max_images=64000")
    assert warm_up(long) == 3000 and not long.notes


@pytest.mark.parametrize(
    "words",
    [["lr_schedule.warmup_images=3000"], ["lr_schedule=constant"]],
    ids=["typed", "constant"],
)
def test_a_warm_up_that_stays_longer_than_the_run_is_told(words):
    """A run under a constant rate can be lengthened: its rate does not depend on its length."""
    plan = planned("trainer.max_images=320", *words)
    assert warm_up(plan) == 3000
    assert any("10.7% of optimizer.lr" in note for note in plan.notes)


@pytest.mark.parametrize(("schedule", "told"), [("cosine", True), ("constant", False)])
def test_what_a_limit_of_time_does_to_the_learning_rate_is_told(schedule, told):
    notes = planned(f"lr_schedule={schedule}", "trainer.max_minutes=2").notes
    assert any("trainer.max_minutes=2" in note for note in notes) == told
