"""Files from anybody: whatever a pickle would do when it is loaded, it does not do here."""

import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile

import numpy as np
import pytest
import torch
import yaml
from reading import newest, with_values

from sdtrain.assemble.load import load
from sdtrain.config.overrides import prepare_arguments
from sdtrain.config.run_readers import check_evaluate, check_sample
from sdtrain.errors import StorageError, UserError
from sdtrain.models.autoencoder import Autoencoder
from sdtrain.paths import shipped_folder
from sdtrain.redaction import redacted
from sdtrain.runs.checkpoint import read_trainer, read_weights
from sdtrain.runs.config import read_config
from sdtrain.runs.layout import CheckpointFolder
from sdtrain.runs.manifest import list_checkpoints
from sdtrain.runs.resume import compare_configs
from sdtrain.schedules.table import table
from sdtrain.training.parts import saved_config
from sdtrain.training.resume import check_changes

LOOK = ["prompt=a star", "num_images=1", "steps=2", "accelerator=cpu"]


class Evil:
    """Loaded by pickle, it makes the folder `marker`."""

    def __init__(self, marker) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def zipped(evil) -> bytes:
    buffer = io.BytesIO()
    torch.save({"state": evil}, buffer)
    return buffer.getvalue()


def tarred(evil) -> bytes:
    """torch's format of before 2017: three pickles in a tar."""
    buffer = io.BytesIO()
    content = pickle.dumps(evil, protocol=2)
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("storages", "tensors", "pickle"):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


PICKLES = {"zip": zipped, "plain": lambda evil: pickle.dumps(evil, protocol=2), "tar": tarred}


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "marker"


@pytest.fixture
def made(marker):
    """made(FORMAT) -> the bytes of such a pickle; loaded without care it does what it wants: the
    twin of every test that asks for it."""
    pickle.loads(pickle.dumps(Evil(marker)))
    marker.rmdir()
    return lambda name: PICKLES[name](Evil(marker))


@pytest.fixture(params=PICKLES)
def evil(request, made) -> bytes:
    return made(request.param)


def with_file(run, tmp_path, name, content):
    """A copy of the run in whose checkpoints `name` holds `content`, with manifests that agree."""
    shutil.copytree(run, tmp_path / "run")
    for folder in list_checkpoints(tmp_path / "run"):
        (folder / name).write_bytes(content)
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path / "run"


def sampled(run, tmp_path) -> list[str]:
    """sdtrain-sample of the run."""
    return ["sdtrain-sample", f"checkpoint={run}", *LOOK, f"output={tmp_path}/out"]


def evaluated(run, tmp_path) -> list[str]:
    """sdtrain-evaluate of the run."""
    words = ["metrics=prompt_accuracy", *LOOK[1:], f"output={tmp_path}/out"]
    return ["sdtrain-evaluate", f"checkpoint={run}", *words]


def resumed(run, tiny) -> list[str]:
    """sdtrain that goes on with the run."""
    words = tiny("resume=must", "trainer.max_images=128")
    return ["sdtrain", *words, f"hydra.run.dir={run}"]


READERS = {
    "trainer.pt": read_trainer,
    "model.safetensors": lambda folder: read_weights(folder, "model"),
    "ema.safetensors": lambda folder: read_weights(folder, "ema"),
}


@pytest.mark.parametrize("name", READERS)
def test_a_pickle_in_a_checkpoint_is_not_loaded(tmp_path, marker, evil, name):
    (tmp_path / name).write_bytes(evil)
    with pytest.raises(StorageError, match=name) as refused:
        READERS[name](tmp_path)
    assert refused.value.key == "checkpoint"
    assert not marker.exists()


def test_a_pickle_as_trainer_state_is_refused_on_resume_and_not_read_otherwise(
    train_tiny, tiny_run, tmp_path, marker, made
):
    run = with_file(tiny_run, tmp_path, "trainer.pt", made("zip"))
    result = train_tiny(run, "resume=must", "trainer.max_images=128")
    assert result.code == 5
    assert "trainer.pt" in result.paragraph
    assert not marker.exists()
    load(CheckpointFolder(newest(run)), ema=True, device="cpu", allow=[], autoencoder=None)
    assert not marker.exists()


@pytest.mark.parametrize(
    "name", ["model.safetensors", pytest.param("ema.safetensors", marks=pytest.mark.slow)]
)
def test_every_command_refuses_a_pickle_as_weights(
    here, tiny, tiny_run, tmp_path, marker, made, name
):
    run = with_file(tiny_run, tmp_path, name, made("zip"))
    for words in (sampled(run, tmp_path), evaluated(run, tmp_path), resumed(run, tiny)):
        result = here(*words)
        assert result.code == 5, words[0]
        assert name in result.paragraph
        assert not marker.exists()


def test_a_pickle_given_as_checkpoint_is_refused(composed, tmp_path, marker, made):
    """By what both commands ask before they load anything."""
    for name in PICKLES:
        file = tmp_path / f"{name}.tar"
        file.write_bytes(made(name))
        for command, check in (("sample", check_sample), ("evaluate", check_evaluate)):
            words = [f"checkpoint={file}"]
            with pytest.raises(UserError) as refused:
                check(with_values(composed(config=command), *words), words)
            assert refused.value.key == "checkpoint", (name, command)
            assert refused.value.exit_code == 2
            assert not marker.exists()


@pytest.mark.parametrize(
    "name", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"]
)
def test_a_pickle_as_weights_of_an_autoencoder_is_refused(tmp_path, marker, evil, name):
    weights = shipped_folder("data", "README.md").rglob("diffusion_pytorch_model.safetensors")
    shutil.copy(next(weights).with_name("config.json"), tmp_path)
    (tmp_path / name).write_bytes(evil)
    with pytest.raises(UserError) as refused:
        Autoencoder(path=str(tmp_path))
    assert refused.value.key == "model.autoencoder.path"
    assert not marker.exists()


@pytest.mark.parametrize("key", ["betas", "alphas_cumprod"])
def test_an_array_of_objects_as_table_is_refused(tmp_path, marker, key):
    file = tmp_path / "table.npy"
    np.save(file, np.array([Evil(marker)], dtype=object), allow_pickle=True)
    np.load(file, allow_pickle=True)  # the twin
    marker.rmdir()
    with pytest.raises(UserError) as refused:
        table(**{key: str(file)})
    assert refused.value.key == f"schedule.{key}"
    assert not marker.exists()


@pytest.mark.parametrize(
    "text", ["schedule: !!python/object/apply:os.mkdir ['{marker}']\n", "- a list\n"]
)
def test_a_configuration_that_is_no_plain_mapping_is_not_read(tmp_path, marker, text):
    file = tmp_path / "config.yaml"
    file.write_text(text.format(marker=marker))
    with pytest.raises(StorageError, match="config.yaml"):
        read_config(file)
    assert not marker.exists()


def test_a_configuration_that_calls_code_is_refused_on_drawing_and_on_resume(
    here, tiny_run, tmp_path, marker
):
    text = f"schedule: !!python/object/apply:os.mkdir ['{marker}']\n"
    run = with_file(tiny_run, tmp_path, "config.yaml", text.encode())
    result = here(*sampled(run, tmp_path))
    assert result.code == 5
    assert "config.yaml" in result.paragraph
    assert not marker.exists()
    with pytest.raises(StorageError, match=r"config\.yaml"):
        check_changes(newest(run), {}, torch.nn.Linear(1, 1), [])
    assert not marker.exists()


# With what yaml, json and a shell would each write in another way.
TOKEN = 'hunter2\'hunter2 "and" more'
LOGIN = "https://me:open-sesame@example.invalid/pictures"
SECRETS = ("hunter2", "open-sesame")


def left_in(run, printed: str) -> set[str]:
    """Which secrets stand in what a run wrote, its checkpoints among it, or printed; written in any
    way."""
    texts = [path.read_text(errors="replace") for path in run.rglob("*") if path.is_file()]
    return {secret for secret in SECRETS if any(secret in text for text in [*texts, printed])}


@pytest.mark.parametrize(
    ("node", "found"),
    [
        (
            {"data": {"token": "abc", "hub_token": "abc", "api_key": "y"}},
            {"data": {"token": "***", "hub_token": "***", "api_key": "***"}},
        ),
        (
            {"tokenizer": "a", "max_tokens": 3, "keys": "a", "secret": None},
            {"tokenizer": "a", "max_tokens": 3, "keys": "a", "secret": None},
        ),
        ("https://x.org/a?api_key=abc&size=3", "https://x.org/a?api_key=***&size=3"),
        ("sdtrain +data.token=abc seed=1", "sdtrain +data.token=*** seed=1"),
        ("https://me:abc@x.org/", "https://***@x.org/"),
        (
            {"_target_": "sdtrain.schedules.linear.linear", "name": "schedules"},
            {"_target_": "sdtrain.schedules.linear.linear", "name": "***"},
        ),
    ],
    ids=["keys", "no secrets", "parameter", "command", "login", "target"],
)
def test_what_is_named_like_a_secret_is_hidden(monkeypatch, node, found):
    monkeypatch.setenv("MY_API_KEY", "schedules")
    assert redacted(node) == found


def test_of_a_secret_that_begins_like_another_nothing_is_left(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "hunter2hunter2")
    monkeypatch.setenv("MY_OTHER_TOKEN", "hunter2hunter2-and-more")
    assert redacted("a hunter2hunter2-and-more b hunter2hunter2 c") == "a *** b *** c"


REDACTING = ("console", "training.parts", "training.outcome", "training.loggers.media")
"""Modules through which everything goes that a run writes and prints."""


@pytest.mark.parametrize(
    "guarded", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["redacted", "twin"]
)
def test_no_secret_is_written(here, tiny, planned, built, tmp_path, monkeypatch, guarded):
    """By ${oc.env:...} and typed, in what a run saves and in what it fails with."""
    monkeypatch.setenv("MY_TOKEN", TOKEN)
    if not guarded:
        for module in REDACTING:
            monkeypatch.setattr(f"sdtrain.{module}.redacted", lambda node: node)
    short = ["trainer.max_images=8", "callbacks.samples.every=0", "validation.every=0"]
    words = tiny(*short, f"name=typed {TOKEN}")
    prompt = f"callbacks.samples.prompts=[\"${{oc.env:MY_TOKEN}}\",'{LOGIN}']"
    run = tmp_path / "run"
    first = here("sdtrain", *words, prompt, f"hydra.run.dir={run}")
    assert first.code == 0, first.err
    assert left_in(run, first.err) == (set() if guarded else set(SECRETS))
    # What is hidden is no change when the run goes on.
    plan = planned(*prepare_arguments([*words, prompt]))
    saved = yaml.safe_load((run / "config.yaml").read_text())
    again = yaml.safe_load(saved_config(plan, built(plan)))
    assert compare_configs(saved, again).changed == {}
    assert compare_configs(saved, again).refused == {}
    failed = tmp_path / "failed"
    bad = f"model.conditioner.tokenizer={TOKEN}"
    failing = here("sdtrain", *words, bad, f"hydra.run.dir={failed}")
    assert failing.code == 2, failing.err
    assert ("tokenizer=***" in failing.paragraph) == guarded
    assert left_in(failed, failing.err) == (set() if guarded else {"hunter2"})
