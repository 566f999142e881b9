"""resume=auto finds the newest run that it may go on with."""

import json
import shutil

import pytest
import yaml
from reading import BARE, status

from sdtrain.paths import config_dir
from sdtrain.training.run_dir import run_dir_overrides

NETWORK = """
import torch


class Plain(torch.nn.Conv2d):
    def __init__(self, *, latent_channels: int) -> None:
        super().__init__(latent_channels, latent_channels, 1)

    def forward(self, x, timestep, context):
        return super().forward(x)
"""


@pytest.fixture
def unfinished(tiny_run, tmp_path, monkeypatch):
    """A folder with one run in it that was interrupted."""
    run = tmp_path / "runs" / "shapes" / "earlier"
    shutil.copytree(tiny_run, run)
    (run / "status.json").write_text(json.dumps(status(run) | {"state": "interrupted"}))
    monkeypatch.chdir(tmp_path)
    return run


def test_an_unfinished_run_is_found_again(found_by, unfinished):
    """With other speed, another end and other looks; and with a default that is typed."""
    values = ["optimizer.lr=0.1", "trainer.max_images=128", "data.num_workers=1", "steps=3"]
    assert found_by("schedule=scaled_linear", *values) == unfinished


OTHER_RUNS = [
    "schedule=linear",
    "model/autoencoder=pixels",
    "seed=1",
    "data.seed=1",
    "times.continuous=true",
    "weighting._target_=sdtrain.diffusion.Other",
    "model.caption_dropout=0.2",
    "model.autoencoder.path=data/../data/shapes_autoencoder",
    "name=other",
    "optimizer._target_=torch.optim.RMSprop",
]


def test_a_run_that_could_not_be_gone_on_with_is_not_found(found_by, unfinished):
    """What resume would refuse is another run: then resume=auto starts anew."""
    for word in OTHER_RUNS:
        assert found_by(word) is None, word
    assert found_by() == unfinished


OWN_CONFIGURATION = [
    ["--config-dir", "conf", "--config-name", "own", "resume=auto"],
    ["-cd=conf", "experiment=own", "resume=auto"],
    ["-cd", "conf", "-cn", "own_that_resumes"],
]


@pytest.mark.parametrize("words", OWN_CONFIGURATION)
def test_a_run_of_the_users_own_configuration_is_found_again(tiny, unfinished, words):
    conf = unfinished.parents[2] / "conf"
    (conf / "experiment").mkdir(parents=True)
    (conf / "own.yaml").write_text("defaults: [train, _self_]\nseed: 7\n")
    (conf / "own_that_resumes.yaml").write_text("defaults: [own, _self_]\nresume: auto\n")
    own = (config_dir() / "experiment" / "shapes.yaml").read_text()
    (conf / "experiment" / "own.yaml").write_text(f"{own}\nseed: 7\n")
    assert run_dir_overrides([*tiny(), *words]) == []
    config = yaml.safe_load((unfinished / "config.yaml").read_text())
    (unfinished / "config.yaml").write_text(yaml.safe_dump(config | {"seed": 7}))
    assert run_dir_overrides([*tiny(), *words]) == [f"hydra.run.dir='{unfinished}'"]


@pytest.mark.parametrize("part", ["autoencoder", "conditioner"])
def test_the_hash_of_a_frozen_part_makes_no_other_run(found_by, unfinished, part):
    """A run writes it once the part is built; who looks for the run has not built it."""
    config = yaml.safe_load((unfinished / "config.yaml").read_text())
    config["model"][part]["sha256"] = "0" * 64
    (unfinished / "config.yaml").write_text(yaml.safe_dump(config))
    assert found_by() == unfinished
    config["model"][part]["sha512"] = "0" * 64
    (unfinished / "config.yaml").write_text(yaml.safe_dump(config))
    assert found_by() is None


@pytest.mark.parametrize("name", ["status.json", "config.yaml"])
def test_a_run_whose_files_are_broken_is_not_found(found_by, unfinished, name):
    whole = (unfinished / name).read_bytes()
    for content in (b"", b"[1]", b"\xff\xfe", b"a: [", b"{}"):
        (unfinished / name).write_bytes(content)
        assert found_by() is None, content
    (unfinished / name).write_bytes(whole)
    assert found_by() == unfinished


def test_a_finished_run_and_one_without_a_checkpoint_are_not_found(found_by, unfinished):
    left = status(unfinished)
    (unfinished / "status.json").write_text(json.dumps(left | {"state": "finished"}))
    assert found_by() is None
    (unfinished / "status.json").write_text(json.dumps(left | {"state": "failed"}))
    assert found_by() == unfinished
    shutil.rmtree(unfinished / "checkpoints")
    assert found_by() is None


@pytest.mark.slow
def test_an_unfinished_run_with_a_network_of_ones_own_is_found_again(
    here, tiny, tmp_path, monkeypatch
):
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "plain_network.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    words = tiny(*BARE, "trainer.max_images=8", "model.unet._target_=plain_network.Plain")
    assert here("sdtrain", *words, cwd=tmp_path).code == 0
    (run,) = (tmp_path / "runs" / "shapes").iterdir()
    run = run.rename(run.with_name("earlier"))
    (run / "status.json").write_text(json.dumps(status(run) | {"state": "interrupted"}))
    result = here("sdtrain", *words, "resume=auto", cwd=tmp_path)
    assert result.code == 0 and "Resuming from" in result.out
