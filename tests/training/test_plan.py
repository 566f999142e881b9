"""What a plan makes of a configuration, beside checking it."""

import pytest
import yaml
from reading import with_values

from sdtrain.training.parts import saved_config


@pytest.fixture
def plan_of(composed, planned):
    """plan_of("lr_schedule=constant", "trainer.max_images=8") -> the plan: of an option, and of
    values that are typed."""

    def plan(option: str, *values: str):
        return planned(option, *values, config=with_values(composed(option), *values))

    return plan


def warm_up(plan) -> int:
    """As config.yaml has it."""
    return yaml.safe_load(saved_config(plan))["lr_schedule"]["warmup_images"]


@pytest.mark.parametrize("experiment", ["shapes", "shapes_autoencoder"])
def test_a_warm_up_is_at_most_a_tenth_of_the_run(plan_of, experiment):
    option = f"experiment={experiment}"
    plan = plan_of(option, "trainer.max_images=320")
    assert warm_up(plan) == 32
    assert any("lr_schedule.warmup_images=32 is used" in note for note in plan.notes)
    assert plan.optimisation().lr_schedule(32, 320) == 1
    assert warm_up(plan_of(option, "trainer.max_images=30000")) == 3000
    long = plan_of(option, "trainer.max_images=64000")
    assert warm_up(long) == 3000 and not long.notes


@pytest.mark.parametrize(
    "words",
    [["experiment=shapes", "lr_schedule.warmup_images=3000"], ["lr_schedule=constant"]],
    ids=["typed", "constant"],
)
def test_a_warm_up_that_stays_longer_than_the_run_is_told(plan_of, words):
    """A run under a constant rate can be lengthened: its rate does not depend on its length."""
    plan = plan_of(*words, "trainer.max_images=320")
    assert warm_up(plan) == 3000
    assert any("10.7% of optimizer.lr" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("option", "told"), [("experiment=shapes", True), ("lr_schedule=constant", False)]
)
def test_what_a_limit_of_time_does_to_the_learning_rate_is_told(plan_of, option, told):
    """The default is a cosine."""
    notes = plan_of(option, "trainer.max_minutes=2").notes
    assert any("trainer.max_minutes=2" in note for note in notes) == told
