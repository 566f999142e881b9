"""What a model reads and no checkpoint holds is kept by the run, or known by its hash."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from sdtrain.paths import find_folder

ALONE = ["callbacks=none", "validation=none", "trainer.max_images=16", "checkpoint.every=8"]
QUICK = ["prompt=a red star", "num_images=1", "steps=2", "accelerator=cpu", "ema=false"]

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


def drawn(here, run, out, cwd, *words) -> np.ndarray:
    result = here("sdtrain-sample", f"checkpoint={run}", *QUICK, f"output={out}", *words, cwd=cwd)
    assert result.code == 0, result.err
    return np.asarray(Image.open(out / "00000-seed0.png"))


def exchange_two_words(folder: Path) -> None:
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    for one, other in (("red</w>", "blue</w>"), ("star</w>", "ring</w>")):
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    file.write_text(json.dumps(tokenizer))


def test_the_tokenizer_is_kept_and_an_exchange_is_noticed(here, tiny, tmp_path):
    shutil.copytree(find_folder("data/tokenizer", ""), tmp_path / "tok")
    (tmp_path / "tok" / "weights.bin").write_bytes(b"is no part of a tokenizer")
    run = tmp_path / "run"
    words = ["model.conditioner.tokenizer=tok", f"hydra.run.dir={run}"]

    def train(*more):
        return here("sdtrain", *tiny(*ALONE, *words, *more), cwd=tmp_path)

    assert train().code == 0
    before = drawn(here, run, tmp_path / "a", tmp_path)
    exchange_two_words(tmp_path / "tok")
    assert np.array_equal(drawn(here, run, tmp_path / "b", "/"), before)
    result = train("resume=must", "trainer.max_images=24")
    assert result.code == 2 and "model.conditioner.files_sha256" in result.paragraph
    result = train("resume=must", "trainer.max_images=24", "resume_allow=[model.conditioner]")
    assert result.code == 0 and "model.conditioner.files_sha256" in result.out, result.err
    # Where the files have gone the run goes on with its own, and is the same.
    shutil.rmtree(tmp_path / "tok")
    result = train("resume=must", "trainer.max_images=32")
    assert result.code == 0 and "files_sha256" not in result.out, result.err
    (copy,) = run.glob("parts/conditioner/tokenizer")
    assert not (copy / "weights.bin").exists()
    exchange_two_words(copy)
    result = here("sdtrain-sample", f"checkpoint={run}", *QUICK, f"output={tmp_path}/c")
    assert result.code == 2 and "model.conditioner" in result.paragraph


def test_a_frozen_part_of_ones_own_is_known_by_its_weights(here, tiny, tmp_path, monkeypatch):
    (tmp_path / "frozen_of_mine.py").write_text(FROZEN)
    monkeypatch.syspath_prepend(tmp_path)
    torch.save(torch.ones(16), tmp_path / "weights.pt")
    run = tmp_path / "run"
    own = ["model.conditioner._target_=frozen_of_mine.Frozen", "model.conditioner.context_dim=16"]
    words = [*own, f"+model.conditioner.weights={tmp_path}/weights.pt", f"hydra.run.dir={run}"]

    def train(*more):
        kept = [word for word in tiny(*ALONE) if not word.startswith("model.conditioner")]
        return here("sdtrain", *kept, *words, *more)

    result = train()
    assert result.code == 0, result.err
    allow = "allow=[frozen_of_mine]"
    drawn(here, run, tmp_path / "a", tmp_path, allow)
    torch.save(torch.zeros(16), tmp_path / "weights.pt")
    result = here("sdtrain-sample", f"checkpoint={run}", *QUICK, allow, f"output={tmp_path}/b")
    assert result.code == 2 and "model.conditioner" in result.paragraph, result.err
    result = train("resume=must", "trainer.max_images=24")
    assert result.code == 2 and "model.conditioner.sha256" in result.paragraph


def test_a_small_autoencoder_is_kept_and_an_exchange_of_its_config_is_noticed(here, tiny, tmp_path):
    folder = shutil.copytree(find_folder("data/shapes_autoencoder", ""), tmp_path / "vae")
    run = tmp_path / "run"
    words = ["model.autoencoder.path=vae", f"hydra.run.dir={run}"]
    assert here("sdtrain", *tiny(*ALONE, *words), cwd=tmp_path).code == 0
    before = drawn(here, run, tmp_path / "a", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    copied = shutil.copytree(run, tmp_path / "elsewhere" / "run")
    assert np.array_equal(drawn(here, copied, tmp_path / "b", "/"), before)
    longer = [*words, "resume=must", "trainer.max_images=24", "model.autoencoder.latent_scale=1"]
    result = here("sdtrain", *tiny(*ALONE, *longer), cwd=tmp_path)
    assert result.code == 2 and "model.autoencoder.files_sha256" in result.paragraph
    shutil.rmtree(copied / "parts")
    result = here("sdtrain-sample", f"checkpoint={copied}", *QUICK, f"output={tmp_path}/c")
    assert result.code == 2 and result.paragraph.startswith("autoencoder="), result.err
    shutil.rmtree(folder)
    result = here("sdtrain-sample", f"checkpoint={copied}", *QUICK, f"output={tmp_path}/c")
    assert result.code == 2 and result.paragraph.startswith("autoencoder="), result.err
    kept = f"autoencoder={run}/parts/autoencoder/path"
    assert np.array_equal(drawn(here, copied, tmp_path / "d", "/", kept), before)
    assert not (run / "parts" / "conditioner" / "tokenizer" / "README.md").exists()
    saved = yaml.safe_load((run / "config.yaml").read_text())["model"]["autoencoder"]
    assert saved["path"] == "vae" and len(saved["files_sha256"]) == 64


@pytest.mark.parametrize("key", ["model.conditioner.files_sha256", "model.autoencoder.sha256"])
def test_a_run_of_a_version_that_took_no_hash_goes_on(key):
    from sdtrain.runs.resume import compare_configs

    *parts, name = key.split(".")
    old = {parts[0]: {parts[1]: {"_target_": "x"}}}
    new = {parts[0]: {parts[1]: {"_target_": "x", name: "a"}}}
    assert not compare_configs(old, new).changed
    assert compare_configs({parts[0]: {parts[1]: {"_target_": "x", name: "b"}}}, new).refused
