"""Commands and runs of a few thousand weights: in this process (`here`), or as processes of their own (`command`)."""

import contextlib
import functools
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

TINY = [
    "trainer.max_images=64",
    "trainer.accelerator=cpu",
    "trainer.threads=1",
    "trainer.log_every=16",
    "data.batch_size=8",
    "data.size=64",
    "data.validation_size=16",
    "model.unet.block_channels=[16,16]",
    "model.unet.norm_groups=8",
    "model.unet.head_dim=8",
    "model.conditioner.context_dim=16",
    "model.conditioner.layers=1",
    "model.block_channels=[8,8,8]",
    "model.norm_groups=4",
    "logger=none",
    "callbacks.samples.num_images=2",
    "callbacks.samples.every=32",
    "callbacks.reconstructions.num_images=2",
    "steps=2",
    "checkpoint.every=16",
    "validation.every=32",
    "callbacks.noise_levels.every=0",
    "callbacks.samples.guidance_scales=[]",
    "lr_schedule.warmup_images=16",
    "optimizer.lr=0.001",
]


@dataclass
class Result:
    """What a command left with and what it said."""

    code: int
    out: str
    err: str

    @property
    def paragraph(self) -> str:
        """What it failed with: one paragraph on stderr, without the place of the traceback."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        assert len(lines) == 1 and lines[0].startswith("sdtrain: "), self.err
        return lines[0].removeprefix("sdtrain: ").partition(" Traceback: ")[0]


@pytest.fixture(scope="session")
def composed():
    """What a command's overrides make of its configuration."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    from sdtrain.paths import config_dir

    def cfg(*overrides: str, config: str = "train") -> dict:
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            return OmegaConf.to_container(compose(config, list(overrides)), resolve=True)

    return cfg


@pytest.fixture(scope="session")
def tiny(composed):
    """`more` after the overrides of TINY whose keys exist beside them: a run of 8 steps, in about a second."""
    from sdtrain.config.check import flat
    from sdtrain.paths import config_dir

    @functools.cache
    def keys(*groups: str) -> frozenset[str]:
        return frozenset(key for key, _ in flat(composed(*groups)))

    def overrides(*more: str) -> list[str]:
        given = {word.partition("=")[0].lstrip("+~"): word for word in more}
        chosen = [
            word
            for key, word in given.items()
            if (config_dir() / key / f"{word.partition('=')[2]}.yaml").is_file()
        ]
        return [
            word for word in TINY if word.partition("=")[0] in keys(*chosen) - given.keys()
        ] + list(more)

    return overrides


@contextlib.contextmanager
def _undone():
    """Whatever a command changes in its process is put back."""
    from hydra.core.global_hydra import GlobalHydra

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    argv, environment, folder = list(sys.argv), dict(os.environ), os.getcwd()
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.chdir(folder)
        sys.argv[:] = argv
        os.environ.clear()
        os.environ.update(environment)
        GlobalHydra.instance().clear()


@pytest.fixture(scope="session")
def here():
    """here("sdtrain", "seed=1", ...): the whole command, but in this process."""

    def run(name: str, *words: str, cwd: Path | None = None) -> Result:
        out, err, code = io.StringIO(), io.StringIO(), 0
        with _undone(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            os.environ.pop("WANDB_API_KEY", None)
            os.chdir(cwd or ".")
            sys.argv[:] = [name, *words]
            try:
                importlib.import_module(
                    f"sdtrain.commands.{ {'sdtrain': 'train'}.get(name, name.removeprefix('sdtrain-')) }"
                ).main()
            except SystemExit as left:
                code = left.code
        return Result(code or 0, out.getvalue(), err.getvalue())

    return run


class Command:
    """A running command, the leader of its process group."""

    def __init__(self, answers, folder: Path) -> None:
        self.answers, self.folder, self.code = answers, folder, None
        self.pid = json.loads(answers.readline())["pid"]

    def said(self, stream: str = "stdout") -> str:
        return (self.folder / stream).read_text() if (self.folder / stream).exists() else ""

    def until(self, condition, seconds: float = 300) -> None:
        """Waits for the condition, which the running command brings about."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.said() + self.said("stderr")
            time.sleep(0.005)

    def wait(self) -> Result:
        if self.code is None:
            self.code = json.loads(self.answers.readline())["code"]
        return Result(self.code, self.said(), self.said("stderr"))

    def end(self) -> None:
        """Nothing of it stays behind when a test leaves early."""
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self.wait()


@pytest.fixture(scope="session")
def server():
    """The process that starts the others: (its input, its output). See preloaded.py."""
    preloaded = [sys.executable, str(Path(__file__).with_name("preloaded.py"))]
    process = subprocess.Popen(
        preloaded,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    yield process
    process.stdin.close()
    process.wait(60)


@pytest.fixture(scope="session")
def start(request, tmp_path_factory):
    """start("sdtrain", "seed=1", ..., cwd=FOLDER, env={...}) -> Command, a process of its own. One at a time.

    before=f"{__file__}:CALL()" calls a function of the test's file in that process, and in each rank that it starts, before the command begins.
    """
    home = tmp_path_factory.mktemp("home")
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "PYTEST"))
    }
    latest = None

    def run(
        name: str,
        *words: str,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
        before: str = "",
    ) -> Command:
        nonlocal latest
        if latest is not None:
            latest.end()
        server, folder = request.getfixturevalue("server"), tmp_path_factory.mktemp("command")
        script = str(Path(sysconfig.get_path("scripts")) / name)
        environment = (
            kept | {"HOME": str(home), "OMP_NUM_THREADS": "1", "BEFORE": before} | (env or {})
        )
        server.stdin.write(
            json.dumps(
                {
                    "argv": [script, *words],
                    "cwd": str(cwd or folder),
                    "env": environment,
                    "output": str(folder),
                }
            )
            + "\n"
        )
        server.stdin.flush()
        latest = Command(server.stdout, folder)
        return latest

    yield run
    if latest is not None:
        latest.end()


@pytest.fixture(scope="session")
def command(start):
    """The same, to its end."""
    return lambda name, *words, cwd=None, env=None, before="": start(
        name, *words, cwd=cwd, env=env, before=before
    ).wait()


@pytest.fixture(scope="session")
def tiny_run(here, tiny, tmp_path_factory):
    """The folder of a finished run. Not to be changed: other tests read it too."""
    run = tmp_path_factory.mktemp("tiny") / "run"
    result = here("sdtrain", *tiny(), f"hydra.run.dir={run}")
    assert result.code == 0, result.err
    return run


@pytest.fixture(scope="session")
def saved():
    """saved(RUN) -> every tensor of its newest checkpoint by name: weights, EMA, and the optimizer's state."""
    from sdtrain.runs.checkpoint import published, read_trainer, read_weights

    def tensors(run: Path) -> dict:
        folder = published(run)[-1]
        found = {
            f"{name}/{key}": value
            for name in ("model", "ema")
            for key, value in (read_weights(folder, name) or {}).items()
        }
        state = read_trainer(folder)["optimizer_states"][0]["state"]
        return found | {
            f"optimizer/{number}/{key}": value
            for number, moments in state.items()
            for key, value in moments.items()
        }

    return tensors
