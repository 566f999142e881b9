"""resume=auto finds the newest run that it may go on with."""

import json
import shutil

import pytest
import yaml
from reading import status, unfinished_by

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


@pytest.mark.parametrize(
    "word",
    [
        "optimizer.lr=0.1",
        "trainer.max_images=128",
        "data.num_workers=1",
        "steps=3",
        "schedule=scaled_linear",
    ],
)
def test_an_unfinished_run_is_found_again(tiny, unfinished, word):
    assert unfinished_by(tiny(word)) == unfinished


@pytest.mark.parametrize(
    "word",
    [
        "seed=1",
        "data.seed=1",
        "schedule=linear",
        "times.continuous=true",
        "weighting._target_=sdtrain.diffusion.Other",
        "model.caption_dropout=0.2",
        "model/autoencoder=pixels",
        "model.autoencoder.path=data/../data/shapes_autoencoder",
        "name=other",
        "optimizer._target_=torch.optim.RMSprop",
    ],
)
def test_a_run_that_could_not_be_gone_on_with_is_not_found(tiny, unfinished, word):
    """What resume would refuse is another run: then resume=auto starts anew."""
    assert unfinished_by(tiny(word)) is None


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
def test_the_hash_of_a_frozen_part_makes_no_other_run(tiny, unfinished, part):
    """A run writes it once the part is built; who looks for the run has not built it."""
    config = yaml.safe_load((unfinished / "config.yaml").read_text())
    config["model"][part]["sha256"] = "0" * 64
    (unfinished / "config.yaml").write_text(yaml.safe_dump(config))
    assert unfinished_by(tiny()) == unfinished
    config["model"][part]["sha512"] = "0" * 64
    (unfinished / "config.yaml").write_text(yaml.safe_dump(config))
    assert unfinished_by(tiny()) is None


@pytest.mark.parametrize("name", ["status.json", "config.yaml"])
@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff\xfe", b"a: [", b"{}"])
def test_a_run_whose_files_are_broken_is_not_found(tiny, unfinished, name, content):
    (unfinished / name).write_bytes(content)
    assert unfinished_by(tiny()) is None


def test_a_finished_run_and_one_without_a_checkpoint_are_not_found(tiny, unfinished):
    (unfinished / "status.json").write_text(json.dumps(status(unfinished) | {"state": "finished"}))
    assert unfinished_by(tiny()) is None
    (unfinished / "status.json").write_text(json.dumps(status(unfinished) | {"state": "failed"}))
    assert unfinished_by(tiny()) == unfinished
    shutil.rmtree(unfinished / "checkpoints")
    assert unfinished_by(tiny()) is None


@pytest.mark.slow
def test_an_unfinished_run_with_a_network_of_ones_own_is_found_again(
    here, tiny, tmp_path, monkeypatch
):
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "plain_network.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    words = [
        word for word in tiny("trainer.max_images=16") if not word.startswith("model.unet.")
    ] + ["model.unet._target_=plain_network.Plain"]
    assert here("sdtrain", *words, cwd=tmp_path).code == 0
    (run,) = (tmp_path / "runs" / "shapes").iterdir()
    run = run.rename(run.with_name("earlier"))
    (run / "status.json").write_text(json.dumps(status(run) | {"state": "interrupted"}))
    result = here("sdtrain", *words, "resume=auto", cwd=tmp_path)
    assert result.code == 0 and "Resuming from" in result.out
