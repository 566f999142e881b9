"""trainer.precision=auto is resolved once for the arms of a sweep."""

from omegaconf import OmegaConf

from sdtrain.sweep.check import make_arms

AUTO = "trainer.precision=auto"


def precisions(arms) -> list[str]:
    return [arm.config["trainer"]["precision"] for arm in arms]


def test_all_arms_have_the_precision_of_the_one_that_has_begun(precheck, tmp_path):
    sweep = precheck(tmp_path, f"seed=0 {AUTO}", f"seed=1 {AUTO}", "seed=2")
    begun = make_arms(sweep)[1]
    begun.config["trainer"]["precision"] = "bf16-mixed"
    begun.run.path.mkdir()
    OmegaConf.save(begun.config, begun.run.config)
    arms = make_arms(sweep)
    assert precisions(arms) == ["bf16-mixed", "bf16-mixed", "32-true"]
    for arm in arms[:2]:
        assert arm.arguments[-1] == "trainer.precision=bf16-mixed"


def test_autoencoders_are_trained_in_float32(precheck, tmp_path):
    autoencoder = "experiment=shapes_autoencoder"
    arms = make_arms(precheck(tmp_path, *(f"{autoencoder} {AUTO} seed={seed}" for seed in (0, 1))))
    assert precisions(arms) == ["32-true", "32-true"]


def test_with_a_prefix_the_arms_decide(precheck, tmp_path):
    """They may run on machines with other devices than the one that plans the sweep."""
    arms = [f"seed={seed} {AUTO} trainer.accelerator=gpu" for seed in (0, 1)]
    assert precisions(make_arms(precheck(tmp_path, *arms, prefix="env"))) == ["auto", "auto"]
