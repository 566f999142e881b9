"""A checkpoint may come from anybody: what its configuration may build is ours, or what the user
allows by name.
"""

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


@pytest.fixture
def doctored(tiny_run, tmp_path):
    """A copy of a run whose checkpoint has another configuration, with a manifest that agrees."""

    def change(*keys_and_node) -> str:
        *keys, node = keys_and_node
        shutil.copytree(tiny_run, tmp_path / "run", dirs_exist_ok=True)
        for folder in list_checkpoints(tmp_path / "run"):
            inner = cfg = yaml.safe_load((folder / "config.yaml").read_text())
            for key in keys[:-1]:
                inner = inner[key]
            inner[keys[-1]] = node
            (folder / "config.yaml").write_text(yaml.safe_dump(cfg))
            manifest, content = (
                json.loads((folder / "manifest.json").read_text()),
                (folder / "config.yaml").read_bytes(),
            )
            manifest["config.yaml"] = {
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
            (folder / "manifest.json").write_text(json.dumps(manifest))
        return str(tmp_path / "run")

    return change


def loaded(run, allow=()):
    whole = CheckpointFolder(find_checkpoint(Path(run)))
    return load(whole, ema=True, device="cpu", allow=list(allow), autoencoder=None)


def test_ours_is_built(doctored):
    assert loaded(doctored("seed", 3)).cfg["seed"] == 3


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
    arguments = (
        {"args": ["mkdir", str(tmp_path / "made")]}
        if target.endswith("run")
        else {"path": str(tmp_path / "made")}
    )
    run = doctored("schedule", {"_target_": target, **arguments})
    with pytest.raises(UserError, match=target.replace(".", r"\.")):
        loaded(run)
    assert not (tmp_path / "made").exists() and (tmp_path / "run").exists()


def test_no_section_builds_what_is_not_ours(doctored, tiny_run, tmp_path):
    """Whatever section of the configuration it stands in, a foreign target is refused, or never
    looked at; it is not called.
    """
    refused = set()
    for section in [
        *yaml.safe_load((tiny_run / "config.yaml").read_text()),
        "modifiers",
        "made_up",
    ]:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        run = doctored(
            section,
            {"inside": {"_target_": "os.mkdir", "path": str(tmp_path / "made"), "_partial_": True}},
        )
        try:
            loaded(run)
        except UserError as error:
            refused |= {section} if "os.mkdir" in str(error) else set()
        except (TypeError, KeyError):
            assert section in ("seed", "name")  # no numbers any more
        assert not (tmp_path / "made").exists()
    assert refused == {
        "model",
        "schedule",
        "modifiers",
        "prediction",
        "weighting",
        "loss",
        "times",
    }


def test_the_data_set_is_checked_when_it_is_asked_for_and_is_not_needed_to_draw(doctored, tmp_path):
    run = doctored("data", {"_target_": "os.mkdir", "path": str(tmp_path / "made")})
    found = loaded(run)
    assert found.image_size == 32
    for ask in (lambda: found.training_data.data, lambda: found.training_data.data_class):
        with pytest.raises(UserError) as refused:
            ask()
        assert refused.value.key == "allow"
    assert not (tmp_path / "made").exists()
    # A run of an earlier version does not say how large its pictures are.
    RunFolder(Path(run)).data_record.unlink()
    with pytest.raises(UserError) as refused:
        _ = loaded(run).image_size
    assert refused.value.key == "allow"


@pytest.mark.parametrize("text", ["", "[]", '{"image_size": 0}', "\xff", '{"image_size": "large"}'])
def test_a_record_of_the_data_that_is_none_of_ours_is_refused(doctored, text):
    run = doctored("seed", 3)
    RunFolder(Path(run)).data_record.write_bytes(text.encode("latin-1"))
    with pytest.raises(StorageError) as refused:
        loaded(run)
    assert "data.json" in str(refused.value)


def test_a_target_deep_inside_is_seen_too(doctored):
    with pytest.raises(UserError, match="somebody"):
        loaded(
            doctored(
                "model", "unet", "block_channels", [16, {"deep": [{"_target_": "somebody.s.Code"}]}]
            )
        )


def test_what_the_user_allows_is_built(doctored, tmp_path, monkeypatch):
    """The twin: what is refused above would have run."""
    (tmp_path / "allowed_package.py").write_text(
        "import os\n\n\ndef schedule(path):\n    os.mkdir(path)\n    raise ValueError('seen')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    run = doctored(
        "schedule", {"_target_": "allowed_package.schedule", "path": str(tmp_path / "made")}
    )
    with pytest.raises(UserError, match=r"allow=\[allowed_package\]"):
        loaded(run)
    assert not (tmp_path / "made").exists()
    with pytest.raises(UserError, match="seen"):
        loaded(run, allow=["allowed_package"])
    assert (tmp_path / "made").exists()


def test_the_hash_of_a_part_whose_constructor_takes_none_is_passed_over(doctored, tiny_run):
    """A frozen part of the user's own may have one; the autoencoder's is checked."""
    conditioner = yaml.safe_load((tiny_run / "config.yaml").read_text())["model"]["conditioner"]
    loaded(doctored("model", "conditioner", conditioner | {"sha256": "0" * 64}))
    with pytest.raises(UserError, match="other weights"):
        loaded(doctored("model", "autoencoder", "sha256", "0" * 64))


def test_a_run_of_a_version_that_ignored_the_shift_draws_as_it_did(doctored, tmp_path):
    """It knew no hash of config.json."""
    folder = shutil.copytree(find_folder("data/shapes_autoencoder", ""), tmp_path / "vae")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"shift_factor": 0.5}))
    run = doctored("model", "autoencoder", "path", str(folder))
    with pytest.raises(UserError) as refused:  # another config.json than this run's
        loaded(run)
    assert refused.value.key == "autoencoder"
    old = {"_target_": "sdtrain.models.autoencoder.Autoencoder", "path": str(folder)}
    assert not loaded(doctored("model", "autoencoder", old)).model.autoencoder.latent_shift
    new = old | {"latent_shift": True}
    assert loaded(doctored("model", "autoencoder", new)).model.autoencoder.latent_shift


def test_an_autoencoders_run_and_what_is_no_model_are_refused(doctored):
    target = "sdtrain.autoencoder_module.AutoencoderModule"  # as an earlier version wrote it
    with pytest.raises(UserError) as refused:
        loaded(doctored("model", {"_target_": target}))
    assert refused.value.key == "checkpoint"
    for section in ("schedule", "model"):
        with pytest.raises(StorageError) as unreadable:
            loaded(doctored(section, None))
        assert unreadable.value.key == "checkpoint"
