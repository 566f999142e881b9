"""What can be refused without torch is refused before torch is imported, and leaves nothing."""

import json
import subprocess
import sys

import pytest

CODE = """
import contextlib, importlib, io, json, os, sys

answers = []
for name, words, variables in json.loads(sys.argv[1]):
    main = importlib.import_module(f"sdtrain.commands.{name}").main
    sys.argv[:] = [f"sdtrain-{name}", *words]
    os.environ.update(variables)
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as left:
            answers.append([left.code, err.getvalue(), "torch" in sys.modules])
print(json.dumps(answers))
"""

# A part of the paragraph: what is typed.
TRAIN = {
    "modl": "modl=x",
    "schedule=cosin": "schedule=cosin",
    "trainer.max_images=0": "trainer.max_images=0",  # others like it: config/test_precheck.py
    "hydra.run.dir": "hydra.run.dir=",
    "already holds a run": "hydra.run.dir=RUN",
    "trainer.max_images": "resume=auto trainer.max_images=0",
    "tariner": "resume=auto tariner.max_images=1",
    "resume=must": "resume=must hydra.run.dir=nothing",
    "data.path": "data=images",
    "steps=0": "steps=0",
    "schedule.betas=nowhere": "schedule=table schedule.betas=nowhere",
    "schedule.alphas_cumprod=nowhere": "schedule=table schedule.alphas_cumprod=nowhere",
    "model.unet.block_channels": "model.unet.block_channels=[-64,64]",
    "model.block_channels": "experiment=shapes_autoencoder model.block_channels=[]",
}
SAMPLE = {
    "checkpoint": "",
    "checkpoint=nowhere": "checkpoint=nowhere",
    "checkpoint=broken": "checkpoint=broken",
    "num_images=0": "checkpoint=RUN num_images=0",
    "steps=0": "checkpoint=RUN steps=0",
    "num_images": "checkpoint=RUN numimages=3",
    "seed": "checkpoint=RUN seed=one",
    "accelerator": "checkpoint=RUN accelerator=tpu",
    "sampler=dimm": "checkpoint=RUN sampler=dimm",
    "sampler": "checkpoint=RUN sampler=none",
    "prompt_file=nowhere": "checkpoint=RUN prompt_file=nowhere",
}
EVALUATE = {
    "checkpoint": "",
    "checkpoint=nowhere": "checkpoint=nowhere",
    "num_images=0": "checkpoint=RUN num_images=0",
    "accelerator": "checkpoint=RUN accelerator=tpu",
    "sampler": "checkpoint=RUN sampler=none",
    "metrics=beauty": "checkpoint=RUN metrics=beauty",
    "metrics": "checkpoint=RUN metrics=[]",
}
REFUSED = {"train": TRAIN, "sample": SAMPLE, "evaluate": EVALUATE}


@pytest.fixture(scope="module")
def told(tiny_run, tmp_path_factory):
    """{(command, part of the paragraph): [exit code, stderr, whether torch is imported]}, all in
    one process; and what they left in their folder."""
    folder = tmp_path_factory.mktemp("refused")
    (folder / "broken" / "checkpoints" / "000000000008").mkdir(parents=True)
    cases = {}
    for name, refused in REFUSED.items():
        for part, words in refused.items():
            words = [word.replace("RUN", str(tiny_run)) for word in words.split()]
            cases[name, part] = (name, words, {})
    of_a_scheduler = ("train", ["trainer.max_images=0"], {"SLURM_PROCID": "1"})
    cases["task", "trainer.max_images=0"] = of_a_scheduler
    cases["twin", "optimizer.lr"] = ("train", ["optimizer.lr=abc"], {"SLURM_PROCID": ""})
    given = [sys.executable, "-c", CODE, json.dumps(list(cases.values()))]
    done = subprocess.run(given, capture_output=True, text=True, cwd=folder, check=True)
    answers = dict(zip(cases, json.loads(done.stdout), strict=True))
    return answers, [path.name for path in folder.iterdir()]


@pytest.mark.parametrize("command", [*REFUSED, "task"])
def test_it_is_refused_before_torch_is_imported(told, command):
    """In one line. A task of a scheduler's that is no rank of ours prints it too."""
    found = {part: told for (name, part), told in told[0].items() if name == command}
    assert found
    for part, (code, err, torch) in found.items():
        assert code == 2 and part in err, (part, err)
        assert len(err.strip().splitlines()) == 1, err
        assert not torch, part


def test_what_is_refused_leaves_nothing(told):
    assert told[1] == ["broken"]


def test_the_process_would_tell_of_torch(told):
    """The twin: what is refused later is refused with torch."""
    code, err, torch = told[0]["twin", "optimizer.lr"]
    assert code == 2 and "optimizer.lr" in err and torch
