"""What a model reads and no checkpoint holds is kept by the run, or known by its hash."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from reading import BARE, newest, with_values
from torch import Tensor

from sdtrain.assemble.load import load
from sdtrain.assemble.model import build_data
from sdtrain.diffusion.guidance import classifier_free
from sdtrain.errors import UserError
from sdtrain.generation.drawing import Drawing, Request
from sdtrain.generation.generate import generate
from sdtrain.paths import find_folder
from sdtrain.runs.layout import CheckpointFolder, RunFolder
from sdtrain.runs.resume import compare_configs
from sdtrain.samplers.ddim import ddim
from sdtrain.samplers.grids import trailing
from sdtrain.training.parts import build_parts, saved_config
from sdtrain.training.progress import Progress
from sdtrain.training.resume import check_changes

SHORT = [
    *BARE,
    "trainer.max_images=8",
    "checkpoint.every=8",
    "lr_schedule.warmup_images=0",
    "data.size=8",
]

FROZEN = """
import torch

from sdtrain.conditioning.interface import Conditioner, Conditioning


class Frozen(Conditioner):
    reads = frozenset({"caption"})
    frozen = True

    def __init__(self, *, context_dim: int, weights: str) -> None:
        super().__init__()
        self.context_dim = context_dim
        self.token = torch.nn.Parameter(torch.load(weights, weights_only=True))

    def forward(self, inputs):
        return Conditioning(self.token.expand(len(inputs.dropped), 1, self.context_dim))
"""


def drawn(run: Path, *, allow=(), autoencoder: str | None = None) -> Tensor:
    """A picture of the run, in two steps."""
    checkpoint = CheckpointFolder(newest(run))
    loaded = load(checkpoint, ema=False, device="cpu", allow=[*allow], autoencoder=autoencoder)
    drawing = Drawing(
        sampler=ddim,
        grid=trailing,
        guidance=classifier_free,
        steps=2,
        guidance_scale=2.0,
        batch_size=1,
    )
    request = Request(0, prompt="a red star")
    return generate(loaded.model, [request], drawing, loaded.image_size)


@pytest.fixture
def changes(planned):
    """changes(RUN, allowed, "seed=1", ...) -> the lines that a run says of what has changed since
    its checkpoint, with these values in its configuration."""

    def found(run: Path, allowed=(), *words: str) -> list[str]:
        config = yaml.safe_load((run / "config.yaml").read_text())
        for part in config["model"].values():
            if isinstance(part, dict):
                for key in ("sha256", "files_sha256"):
                    part.pop(key, None)
        config |= {"resume": "must", "resume_allow": [*allowed]}
        plan = planned(config=with_values(config, *words))
        progress = Progress(plan.config["data"]["batch_size"], 16)
        parts = build_parts(plan, build_data(plan.config["data"]), run, progress)
        new = yaml.safe_load(saved_config(plan, parts))
        return check_changes(newest(run), new, parts.module, [*allowed])

    return found


def exchange_two_words(folder: Path) -> None:
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    for one, other in (("red</w>", "blue</w>"), ("star</w>", "ring</w>")):
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    file.write_text(json.dumps(tokenizer))


@pytest.fixture(scope="module")
def trained(train_tiny, tmp_path_factory):
    """A folder with a tokenizer in tok/ and an autoencoder in vae/, and a run that was trained
    there on both."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(find_folder("data/tokenizer", ""), folder / "tok")
    (folder / "tok" / "weights.bin").write_bytes(b"is no part of a tokenizer")
    shutil.copytree(find_folder("data/shapes_autoencoder", ""), folder / "vae")
    words = [*SHORT, "model.conditioner.tokenizer=tok", "model.autoencoder.path=vae"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = train_tiny(folder / "run", *words)
    assert result.code == 0, result.err
    return folder


@pytest.fixture
def folder(trained, tmp_path, monkeypatch):
    """A copy of it, in which a test works, and in which the run seems to have been trained."""
    folder = shutil.copytree(trained, tmp_path / "copy")
    file = RunFolder(folder / "run").data_record
    record = json.loads(file.read_text()) | {"working_directory": str(folder)}
    file.write_text(json.dumps(record))
    monkeypatch.chdir(folder)
    return folder


def test_the_tokenizer_is_kept_and_an_exchange_is_noticed(folder, changes, monkeypatch):
    run = folder / "run"
    before = drawn(run)
    exchange_two_words(folder / "tok")
    monkeypatch.chdir("/")
    assert torch.equal(drawn(run), before)
    monkeypatch.chdir(folder)
    with pytest.raises(UserError) as refused:
        changes(run)
    assert refused.value.key == "model.conditioner.files_sha256"
    (line,) = changes(run, ["model.conditioner"])
    assert "model.conditioner.files_sha256" in line
    # Where the files have gone the run goes on with its own, and is the same.
    shutil.rmtree(folder / "tok")
    assert changes(run) == []
    (copy,) = run.glob("parts/conditioner/tokenizer")
    assert not (copy / "weights.bin").exists()
    assert not (copy / "README.md").exists()
    exchange_two_words(copy)
    with pytest.raises(UserError) as refused:
        drawn(run)
    assert "model.conditioner" in str(refused.value)


def test_a_small_autoencoder_is_kept_and_an_exchange_of_its_config_is_noticed(
    folder, changes, monkeypatch
):
    run = folder / "run"
    before = drawn(run)
    file = folder / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"scaling_factor": 0.5}))
    copied = shutil.copytree(run, folder / "elsewhere" / "run")
    monkeypatch.chdir("/")
    assert torch.equal(drawn(copied), before)
    monkeypatch.chdir(folder)
    with pytest.raises(UserError) as refused:
        changes(run, (), "model.autoencoder.latent_scale=1")
    assert refused.value.key == "model.autoencoder.files_sha256"
    # Without a copy the files are looked for: first they are others, then there are none.
    shutil.rmtree(copied / "parts")
    for state in ("exchanged", "gone"):
        with pytest.raises(UserError) as refused:
            drawn(copied)
        assert refused.value.key == "autoencoder", state
        shutil.rmtree(folder / "vae", ignore_errors=True)
    kept = run / "parts" / "autoencoder" / "path"
    assert torch.equal(drawn(copied, autoencoder=str(kept)), before)
    saved = yaml.safe_load((run / "config.yaml").read_text())["model"]["autoencoder"]
    assert saved["path"] == "vae"
    assert len(saved["files_sha256"]) == 64


def test_a_frozen_part_of_ones_own_is_known_by_its_weights(run_of, changes, tmp_path, monkeypatch):
    (tmp_path / "frozen_of_mine.py").write_text(FROZEN)
    monkeypatch.syspath_prepend(tmp_path)
    torch.save(torch.ones(16), tmp_path / "weights.pt")
    own = ["model.conditioner._target_=frozen_of_mine.Frozen", "model.conditioner.context_dim=16"]
    words = [*own, f"+model.conditioner.weights={tmp_path}/weights.pt"]
    run = run_of("run", *SHORT, *words, "~model.conditioner.layers")
    drawn(run, allow=["frozen_of_mine"])
    assert changes(run) == []
    torch.save(torch.zeros(16), tmp_path / "weights.pt")
    with pytest.raises(UserError) as refused:
        drawn(run, allow=["frozen_of_mine"])
    assert "model.conditioner" in str(refused.value)
    with pytest.raises(UserError) as refused:
        changes(run)
    assert refused.value.key == "model.conditioner.sha256"


@pytest.mark.parametrize("key", ["model.conditioner.files_sha256", "model.autoencoder.sha256"])
def test_a_run_of_a_version_that_took_no_hash_goes_on(key):
    *parts, name = key.split(".")
    old = {parts[0]: {parts[1]: {"_target_": "x"}}}
    new = {parts[0]: {parts[1]: {"_target_": "x", name: "a"}}}
    assert not compare_configs(old, new).changed
    assert compare_configs({parts[0]: {parts[1]: {"_target_": "x", name: "b"}}}, new).refused
