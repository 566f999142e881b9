"""What can be refused without torch is refused before torch is imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import contextlib, importlib, io, json, sys

name, *cases = json.loads(sys.argv[1])
main = importlib.import_module(f"sdtrain.commands.{name}").main
answers = []
for words in cases:
    sys.argv[:] = [f"sdtrain-{name}", *words]
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as left:
            answers.append([left.code, err.getvalue(), "torch" in sys.modules])
print(json.dumps(answers))
"""


def answers(name: str, cases: list[list[str]], folder: Path) -> list[list]:
    """[exit code, stderr, whether torch is imported] after each case, all in one fresh process."""
    given = json.dumps([name, *cases])
    done = subprocess.run(
        [sys.executable, "-c", CODE, given], capture_output=True, text=True, cwd=folder, check=True
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["sample", "evaluate"])
def test_it_is_refused_before_torch_is_imported(name, tiny_run, tmp_path):
    run = f"checkpoint={tiny_run}"
    broken = tmp_path / "broken"
    (broken / "checkpoints" / "000000000008").mkdir(parents=True)
    cases = {
        "checkpoint": [],
        "checkpoint=nowhere": ["checkpoint=nowhere"],
        f"checkpoint={broken}": [f"checkpoint={broken}"],
        "num_images=0": [run, "num_images=0"],
        "steps=0": [run, "steps=0"],
        "num_images": [run, "numimages=3"],
        "seed": [run, "seed=one"],
        "accelerator": [run, "accelerator=tpu"],
        "sampler=dimm": [run, "sampler=dimm"],
        "sampler": [run, "sampler=none"],
    }
    if name == "sample":
        cases["prompt_file=nowhere"] = [run, "prompt_file=nowhere"]
    else:
        cases["metrics=beauty"] = [run, "metrics=beauty"]
        cases["metrics"] = [run, "metrics=[]"]
    told = answers(name, list(cases.values()), tmp_path)
    assert len(told) == len(cases)
    for key, (code, err, torch) in zip(cases, told, strict=True):
        assert code == 2 and key in err, err
        assert not torch, key
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_training_is_refused_before_torch_is_imported(tmp_path):
    cases = {
        "data.path": ["data=images"],
        "steps=0": ["steps=0"],
        "optimizer.lr=-1": ["optimizer.lr=-1"],
        "schedule.betas=nowhere": ["schedule=table", "schedule.betas=nowhere"],
        "schedule.alphas_cumprod=nowhere": ["schedule=table", "schedule.alphas_cumprod=nowhere"],
        "model.unet.block_channels": ["model.unet.block_channels=[-64,64]"],
        "model.block_channels": ["experiment=shapes_autoencoder", "model.block_channels=[]"],
        "trainer.max_images": ["trainer.max_images=0"],
    }
    told = answers("train", list(cases.values()), tmp_path)
    for key, (code, err, torch) in zip(cases, told, strict=True):
        assert code == 2 and key in err, err
        assert not torch, key
    assert not list(tmp_path.iterdir())


def test_the_process_would_tell_of_torch(tiny_run, tmp_path):
    """The twin: what is refused later is refused with torch."""
    word = [f"checkpoint={tiny_run}", "prompt=a star", "sampler.eta=many"]
    ((code, err, torch),) = answers("sample", [word], tmp_path)
    assert code == 2 and "sampler.eta" in err and torch
