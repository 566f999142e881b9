"""A checkpoint may come from anybody: what its configuration may build is ours, or what the user
allows by name.
"""

import contextlib
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import yaml

from sdtrain.assemble.load import load
from sdtrain.errors import StorageError, UserError
from sdtrain.paths import find_folder
from sdtrain.runs.layout import CheckpointFolder, RunFolder
from sdtrain.runs.manifest import find_checkpoint, list_checkpoints

BUILT = ("model", "schedule", "modifiers", "prediction", "weighting", "loss", "times")


@pytest.fixture(scope="module")
def trained(tiny_run, tmp_path_factory):
    """A run with its newest checkpoint alone."""
    run = tmp_path_factory.mktemp("trained") / "run"
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("*.png"))
    for older in list_checkpoints(run)[:-1]:
        shutil.rmtree(older)
    return run


@pytest.fixture(scope="module")
def config(trained):
    """The configuration of that run."""
    return yaml.safe_load((trained / "config.yaml").read_text())


@pytest.fixture
def doctored(trained, config, tmp_path):
    """doctored({...}) -> a copy of the run whose checkpoint has these sections in place of its own,
    with a manifest that agrees."""

    def change(sections: dict) -> Path:
        run = tmp_path / "run"
        shutil.copytree(trained, run, dirs_exist_ok=True)
        (folder,) = list_checkpoints(run)
        content = yaml.safe_dump(config | sections).encode()
        (folder / "config.yaml").write_bytes(content)
        manifest = json.loads((folder / "manifest.json").read_text())
        digest = hashlib.sha256(content).hexdigest()
        manifest["config.yaml"] = {"bytes": len(content), "sha256": digest}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return run

    return change


def loaded(run, allow=()):
    whole = CheckpointFolder(find_checkpoint(run))
    return load(whole, ema=True, device="cpu", allow=list(allow), autoencoder=None)


def with_part(config, part: str, **values) -> dict:
    """The configuration's model, with other values in one of its parts."""
    return config["model"] | {part: config["model"][part] | values}


def test_ours_is_built(doctored):
    assert loaded(doctored({"seed": 3})).cfg["seed"] == 3


@pytest.mark.parametrize(
    "target",
    [
        "os.mkdir",
        "os.system",
        "subprocess.run",
        "builtins.eval",
        "torch.load",
        "torch.hub.load",
        "pickle.loads",
        "sdtrain_lookalike.Schedule",
        "sdtrain.training.run.os.mkdir",
        "sdtrain.runs.checkpoint.os.mkdir",
        "sdtrain.training.run.subprocess.run",
        "sdtrain.runs.checkpoint.shutil.rmtree",
        "sdtrain.runs.checkpoint.shutil.os.mkdir",
    ],
)
def test_what_is_not_ours_is_refused_and_not_called(doctored, tmp_path, target):
    arguments = {"path": str(tmp_path / "made")}
    if target.endswith("run"):
        arguments = {"args": ["mkdir", str(tmp_path / "made")]}
    run = doctored({"schedule": {"_target_": target, **arguments}})
    with pytest.raises(UserError, match=target.replace(".", r"\.")):
        loaded(run)
    assert not (tmp_path / "made").exists()
    assert run.exists()


def test_no_section_builds_what_is_not_ours(doctored, config, tmp_path):
    """Whatever section of the configuration it stands in, a foreign target is refused, or never
    looked at; it is not called.
    """
    made = tmp_path / "made"
    foreign = {"inside": {"_target_": "os.mkdir", "path": str(made), "_partial_": True}}
    for section in BUILT:
        with pytest.raises(UserError, match=r"os\.mkdir"):
            loaded(doctored({section: foreign}))
        assert not made.exists(), section
    passed_over = {*config, "made_up"} - {*BUILT, "seed", "name"}
    loaded(doctored(dict.fromkeys(passed_over, foreign)))
    assert not made.exists()
    for plain in ("seed", "name"):
        with contextlib.suppress(TypeError, KeyError):  # no plain value any more
            loaded(doctored({plain: foreign}))
        assert not made.exists(), plain


def test_the_data_set_is_checked_when_it_is_asked_for_and_is_not_needed_to_draw(doctored, tmp_path):
    run = doctored({"data": {"_target_": "os.mkdir", "path": str(tmp_path / "made")}})
    found = loaded(run)
    assert found.image_size == 32
    for ask in (lambda: found.training_data.data, lambda: found.training_data.data_class):
        with pytest.raises(UserError) as refused:
            ask()
        assert refused.value.key == "allow"
    assert not (tmp_path / "made").exists()
    # A run of an earlier version does not say how large its pictures are.
    RunFolder(run).data_record.unlink()
    with pytest.raises(UserError) as refused:
        _ = loaded(run).image_size
    assert refused.value.key == "allow"


@pytest.mark.parametrize("text", ["", "[]", '{"image_size": 0}', "\xff", '{"image_size": "large"}'])
def test_a_record_of_the_data_that_is_none_of_ours_is_refused(doctored, text):
    run = doctored({"seed": 3})
    RunFolder(run).data_record.write_bytes(text.encode("latin-1"))
    with pytest.raises(StorageError) as refused:
        loaded(run)
    assert "data.json" in str(refused.value)


def test_a_target_deep_inside_is_seen_too(doctored, config):
    deep = [16, {"deep": [{"_target_": "somebody.s.Code"}]}]
    run = doctored({"model": with_part(config, "unet", block_channels=deep)})
    with pytest.raises(UserError, match="somebody"):
        loaded(run)


def test_what_the_user_allows_is_built(doctored, tmp_path, monkeypatch):
    """The twin: what is refused above would have run."""
    (tmp_path / "allowed_package.py").write_text(
        "import os\n\n\ndef schedule(path):\n    os.mkdir(path)\n    raise ValueError('seen')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    node = {"_target_": "allowed_package.schedule", "path": str(tmp_path / "made")}
    run = doctored({"schedule": node})
    with pytest.raises(UserError, match=r"allow=\[allowed_package\]"):
        loaded(run)
    assert not (tmp_path / "made").exists()
    with pytest.raises(UserError, match="seen"):
        loaded(run, allow=["allowed_package"])
    assert (tmp_path / "made").exists()


def test_the_hash_of_a_part_whose_constructor_takes_none_is_passed_over(doctored, config):
    """A frozen part of the user's own may have one; the autoencoder's is checked."""
    loaded(doctored({"model": with_part(config, "conditioner", sha256="0" * 64)}))
    with pytest.raises(UserError, match="other weights"):
        loaded(doctored({"model": with_part(config, "autoencoder", sha256="0" * 64)}))


def test_a_run_of_a_version_that_ignored_the_shift_draws_as_it_did(doctored, config, tmp_path):
    """It knew no hash of config.json."""
    folder = shutil.copytree(find_folder("data/shapes_autoencoder", ""), tmp_path / "vae")
    shifted = json.loads((folder / "config.json").read_text()) | {"shift_factor": 0.5}
    (folder / "config.json").write_text(json.dumps(shifted))
    run = doctored({"model": with_part(config, "autoencoder", path=str(folder))})
    with pytest.raises(UserError) as refused:  # another config.json than this run's
        loaded(run)
    assert refused.value.key == "autoencoder"
    old = {"_target_": "sdtrain.models.autoencoder.Autoencoder", "path": str(folder)}
    for node, expected in ((old, False), (old | {"latent_shift": True}, True)):
        found = loaded(doctored({"model": config["model"] | {"autoencoder": node}}))
        assert bool(found.model.autoencoder.latent_shift) is expected


def test_an_autoencoders_run_and_what_is_no_model_are_refused(doctored):
    target = "sdtrain.autoencoder_module.AutoencoderModule"  # as an earlier version wrote it
    with pytest.raises(UserError) as refused:
        loaded(doctored({"model": {"_target_": target}}))
    assert refused.value.key == "checkpoint"
    for section in ("schedule", "model"):
        with pytest.raises(StorageError) as unreadable:
            loaded(doctored({section: None}))
        assert unreadable.value.key == "checkpoint"
