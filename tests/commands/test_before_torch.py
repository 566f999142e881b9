"""What can be refused without torch is refused before torch is imported, and leaves nothing."""

import json
import subprocess
import sys

import pytest
from reading import with_values

pytestmark = pytest.mark.slow

CODE = """
import contextlib, importlib, io, json, os, sys

from sdtrain.config.precheck import precheck_config
from sdtrain.config.run_readers import check_evaluate, check_sample
from sdtrain.errors import UserError

CHECKS = {"train": precheck_config, "sample": check_sample, "evaluate": check_evaluate}


class TorchIsAskedFor(Exception):
    pass


class NoTorch:
    def find_spec(self, name, path, target=None):
        if name == "torch":
            raise TorchIsAskedFor


def told_by_command(name, words, variables):
    sys.argv[:] = [f"sdtrain-{name}", *words]
    os.environ.update(variables)
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        try:
            importlib.import_module(f"sdtrain.commands.{name}").main()
        except SystemExit as left:
            return [left.code, err.getvalue()]
        except TorchIsAskedFor:
            return ["torch", ""]


def told_by_check(name, config, typed):
    try:
        CHECKS[name](config, typed)
    except UserError as error:
        return [error.exit_code, str(error)]
    except TorchIsAskedFor:
        return ["torch", ""]


sys.meta_path.insert(0, NoTorch())
given = json.loads(sys.argv[1])
answers = [told_by_command(*case) for case in given["commands"]]
answers += [told_by_check(*case) for case in given["checks"]]
print(json.dumps(answers))
"""

# A part of the paragraph: what is typed. One command of each kind.
COMMANDS = {
    "train": {
        "modl": "modl=x",
        "schedule=cosin": "schedule=cosin",
        "trainer.max_images=0": "trainer.max_images=0",  # others like it: config/test_precheck.py
        "hydra.run.dir": "hydra.run.dir=",
        "already holds a run": "hydra.run.dir=RUN",
        "trainer.max_images": "resume=auto trainer.max_images=0",
        "tariner": "resume=auto tariner.max_images=1",
        "resume=must": "resume=must hydra.run.dir=nothing",
    },
    "sample": {"checkpoint": "", "num_images": "checkpoint=RUN numimages=3"},
    "evaluate": {"metrics=beauty": "checkpoint=RUN metrics=beauty"},
}
# A part of the message: (what Hydra composes, what is set then).
CHECKS = {
    "train": {
        "steps=0": ("", "steps=0"),
        "data.path": ("data=images", ""),
        "data.depth": ("data=images", "data.path=. data.depth=nowhere"),
        "data.depth_model": ("data=images", "data.path=. data.depth_model=a/b"),
        "schedule.betas=nowhere": ("schedule=table", "schedule.betas=nowhere"),
        "schedule.alphas_cumprod=nowhere": ("schedule=table", "schedule.alphas_cumprod=nowhere"),
        "model.unet.block_channels": ("", "model.unet.block_channels=[-64,64]"),
        "model.block_channels": ("experiment=shapes_autoencoder", "model.block_channels=[]"),
    },
    "sample": {
        "checkpoint=nowhere": ("", "checkpoint=nowhere"),
        "checkpoint=broken": ("", "checkpoint=broken"),
        "num_images=0": ("", "checkpoint=RUN num_images=0"),
        "steps=0": ("", "checkpoint=RUN steps=0"),
        "seed": ("", "checkpoint=RUN seed=one"),
        "accelerator": ("", "checkpoint=RUN accelerator=tpu"),
        "sampler": ("", "checkpoint=RUN sampler=null"),
        "prompt_file=nowhere": ("", "checkpoint=RUN prompt_file=nowhere"),
        "strength=1.5": ("", "checkpoint=RUN init_image=RUN strength=1.5"),
        "strength": ("", "checkpoint=RUN init_image=RUN strength=.nan"),
        "strength=0.5": ("", "checkpoint=RUN strength=0.5"),
        "init_image=nowhere": ("", "checkpoint=RUN init_image=nowhere"),
        "mask=nowhere": ("", "checkpoint=RUN init_image=RUN mask=nowhere"),
        "mask=here": ("", "checkpoint=RUN mask=here"),
        "init_image=": ("", "checkpoint=RUN init_image=''"),
        "strength=0.2": ("", "checkpoint=RUN init_image=RUN steps=4 strength=0.2"),
        "save_latents": ("", "checkpoint=RUN init_image=RUN save_latents=true"),
        "depth=nowhere": ("", "checkpoint=RUN depth=nowhere"),
        "depth_model=a/b has no effect with": (
            "",
            "checkpoint=RUN init_image=RUN depth=RUN depth_model=a/b",
        ),
        "depth_model=a/b has no effect without": ("", "checkpoint=RUN depth_model=a/b"),
    },
    "evaluate": {
        "checkpoint=nowhere": ("", "checkpoint=nowhere"),
        "metrics": ("", "checkpoint=RUN metrics={}"),
        "num_images=0": ("", "checkpoint=RUN num_images=0"),
        "accelerator": ("", "checkpoint=RUN accelerator=tpu"),
        "sampler": ("", "checkpoint=RUN sampler=null"),
    },
}


@pytest.fixture(scope="module")
def told(tiny_run, composed, tmp_path_factory):
    """({(command, part of the paragraph): [exit code, stderr]}, the same of the checks alone, what
    they left in their folder). All in one process, in which an import of torch fails: then the exit
    code is "torch"."""
    folder = tmp_path_factory.mktemp("refused")
    (folder / "broken" / "checkpoints" / "000000000008").mkdir(parents=True)

    def words(typed: str) -> list[str]:
        return [word.replace("RUN", str(tiny_run)) for word in typed.split()]

    commands = {}
    for name, refused in COMMANDS.items():
        for part, typed in refused.items():
            commands[name, part] = (name, words(typed), {})
    sweep = ["-m", "data.batch_size=8,9", "trainer.accumulate=2", "hydra.sweep.dir=swept"]
    sweep.append("hydra.launcher.prefix=env --unset=A")  # which may hold any sign
    commands["sweep", "In the arm data.batch_size=9"] = ("train", sweep, {})
    of_a_scheduler = ("train", ["trainer.max_images=0"], {"SLURM_PROCID": "1"})
    commands["task", "trainer.max_images=0"] = of_a_scheduler
    commands["twin", "optimizer.lr"] = ("train", ["optimizer.lr=abc"], {"SLURM_PROCID": ""})
    checks = {}
    for name, refused in CHECKS.items():
        for part, (options, values) in refused.items():
            config = composed(*options.split(), config=name)
            checks[name, part] = (name, with_values(config, *words(values)), words(values))
    given = {"commands": list(commands.values()), "checks": list(checks.values())}
    process = [sys.executable, "-c", CODE, json.dumps(given)]
    done = subprocess.run(process, capture_output=True, text=True, cwd=folder, check=True)
    answers = json.loads(done.stdout)
    by_command = dict(zip(commands, answers[: len(commands)], strict=True))
    by_check = dict(zip(checks, answers[len(commands) :], strict=True))
    return by_command, by_check, [path.name for path in folder.iterdir()]


@pytest.mark.parametrize("command", [*COMMANDS, "sweep", "task"])
def test_it_is_refused_before_torch_is_imported(told, command):
    """In one line: also a sweep, by the last check of its arms. A task of a scheduler's that is no
    rank of ours prints it too."""
    found = {part: answer for (name, part), answer in told[0].items() if name == command}
    assert found
    for part, (code, err) in found.items():
        assert code == 2 and part in err, (part, code, err)
        assert len(err.strip().splitlines()) == 1, err


def test_the_checks_before_torch_refuse_it(told):
    """What a command calls before it imports torch."""
    for (name, part), (code, message) in told[1].items():
        assert code == 2 and part in message, (name, part, code, message)


def test_what_is_refused_leaves_nothing(told):
    assert told[2] == ["broken"]


def test_the_process_would_tell_of_torch(told):
    """The twin: what is refused later asks for torch."""
    assert told[0]["twin", "optimizer.lr"] == ["torch", ""]
