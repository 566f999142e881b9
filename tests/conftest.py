"""Commands and runs of a few thousand weights: in this process (`here`; `train_tiny` without
Hydra's command line), or as processes of their own (`command`)."""

import contextlib
import copy
import functools
import gc
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
from reading import SMALL, newest, tensors, with_model_values

MODULES = {"sdtrain": "train"}
"""Of a command under sdtrain.commands, where it is not called alike."""

INTERRUPTING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

TINY = [
    "logger=none",
    "trainer.max_images=64",
    "trainer.accelerator=cpu",
    "trainer.threads=1",
    "trainer.precision=32-true",
    "trainer.log_every=16",
    "data.batch_size=8",
    "data.size=32",
    "data.validation_size=16",
    *SMALL,
    "model.block_channels=[8,8,8]",
    "model.norm_groups=4",
    "callbacks.samples.num_images=2",
    "callbacks.samples.every=32",
    "callbacks.reconstructions.num_images=2",
    "steps=2",
    "checkpoint.every=16",
    "validation.every=32",
    "callbacks.noise_levels.every=0",
    "looks.share=null",
    "callbacks.samples.guidance_scales=[]",
    "lr_schedule.warmup_images=16",
    "optimizer.lr=0.001",
]


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory):
    """No test reads or writes the user's cache."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("user_cache")))
    yield
    patch.undo()


def pytest_collection_finish() -> None:
    """The collector need not look again and again at what the imports have made, which stays."""
    gc.collect()
    gc.freeze()


@dataclass
class Result:
    """What a command left with and what it said. group: of its processes, where it had its own."""

    code: int
    out: str
    err: str
    group: int = 0

    @property
    def paragraph(self) -> str:
        """What it failed with: one paragraph on stderr, without the place of the traceback."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        assert len(lines) == 1 and lines[0].startswith("sdtrain: "), self.err
        return lines[0].removeprefix("sdtrain: ").partition(" Traceback: ")[0]


@pytest.fixture(scope="session")
def composed():
    """What a command's overrides make of its configuration. Hydra is asked once for each."""
    from sdtrain.config.compose import compose_config

    @functools.cache
    def cached(config: str, overrides: tuple[str, ...]) -> dict:
        return compose_config(config, list(overrides))

    def cfg(*overrides: str, config: str = "train") -> dict:
        return copy.deepcopy(cached(config, overrides))

    return cfg


@pytest.fixture(scope="session")
def planned(composed):
    """planned("seed=1", ...) -> the plan of a run. config: instead of what the words compose."""
    from sdtrain.config.precheck import precheck_config
    from sdtrain.training.plan import make_plan

    def plan(*words: str, config: dict | None = None):
        return make_plan(precheck_config(config or composed(*words), words))

    return plan


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """built(PLAN) -> data, model and loaders, as a run builds them before it trains."""
    from sdtrain.assemble.model import build_data
    from sdtrain.training.parts import build_parts
    from sdtrain.training.progress import Progress
    from sdtrain.training.trainer import check_devices

    folder = tmp_path_factory.mktemp("built")

    def build(plan):
        check_devices(plan.prechecked.trainer)
        progress = Progress(plan.config["data"]["batch_size"], plan.prechecked.trainer.max_images)
        return build_parts(plan, build_data(plan.config["data"]), folder, progress)

    return build


@pytest.fixture(scope="session")
def refused(planned, built):
    """refused("seed=x", ...) -> the error with which a run ends before it has begun. config:
    instead of what the words compose."""
    from sdtrain.config.boundary import CONFIGURATION_ERRORS, as_user_error
    from sdtrain.config.compose import known_keys
    from sdtrain.errors import UserError

    keys_of = functools.cache(known_keys)

    def error_of(*words: str, config: dict | None = None) -> UserError:
        try:
            built(planned(*words, config=config))
        except CONFIGURATION_ERRORS as error:
            return as_user_error(error, lambda: keys_of("train"), words)
        except UserError as error:
            return error
        raise AssertionError(f"{words} is not refused")

    return error_of


def is_option(word: str) -> bool:
    """Whether it chooses a yaml of configs/, as schedule=linear does, or several of a group."""
    from sdtrain.paths import config_dir

    group, _, value = word.partition("=")
    folder = config_dir() / group.lstrip("+~")
    names = value[1:-1].split(",") if value.startswith("[") else [value]
    return all((folder / f"{name}.yaml").is_file() for name in names)


def options_of(words: Iterable[str]) -> list[str]:
    """The options of a tiny run with these words."""
    # model=stable_diffusion composes only with the pretrained folder.
    source = ("model.pretrained=", "model.revision=")
    chosen = [word for word in words if is_option(word) or word.startswith(source)]
    groups = {word.partition("=")[0] for word in chosen}
    usual = [word for word in TINY if is_option(word) and word.partition("=")[0] not in groups]
    return usual + chosen


@pytest.fixture(scope="session")
def tiny(composed):
    """`more` after the overrides of TINY whose keys exist beside them: a run of 8 steps, in about a
    second. A network of one's own has none of their keys."""
    from sdtrain.runs.resume import flatten

    @functools.cache
    def keys(*groups: str) -> frozenset[str]:
        return frozenset(key for key, _ in flatten(composed(*groups)))

    def overrides(*more: str) -> list[str]:
        given = {word.partition("=")[0].lstrip("+~") for word in more}
        wanted = keys(*options_of(more)) - given
        if "model.unet._target_" in given:
            wanted = {key for key in wanted if not key.startswith("model.unet.")}
        return [word for word in TINY if word.partition("=")[0] in wanted] + list(more)

    return overrides


@contextlib.contextmanager
def _undone():
    """Whatever a command changes in its process is put back."""
    from hydra.core.global_hydra import GlobalHydra

    from sdtrain.console import set_rank

    handlers = {number: signal.getsignal(number) for number in INTERRUPTING}
    argv = list(sys.argv)
    path = list(sys.path)
    environment = dict(os.environ)
    folder = os.getcwd()
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.chdir(folder)
        sys.argv[:] = argv
        sys.path[:] = path
        set_rank(0)
        os.environ.clear()
        os.environ.update(environment)
        GlobalHydra.instance().clear()


@pytest.fixture(scope="session")
def here():
    """here("sdtrain", "seed=1", ...): the whole command, but in this process."""

    def run(name: str, *words: str, cwd: Path | None = None) -> Result:
        out = io.StringIO()
        err = io.StringIO()
        code = 0
        with _undone(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            os.environ.pop("WANDB_API_KEY", None)
            os.chdir(cwd or ".")
            sys.argv[:] = [name, *words]
            module = MODULES.get(name, name.removeprefix("sdtrain-"))
            try:
                importlib.import_module(f"sdtrain.commands.{module}").main()
            except SystemExit as left:
                code = left.code
        return Result(code or 0, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def tiny_config(composed, tiny):
    """tiny_config("schedule=linear", "seed=1", ...) -> the configuration of those words after the
    ones of TINY. Hydra is asked once for the options; plain values are set in what it composed."""

    def made(*words: str) -> dict:
        values = [word for word in tiny(*words) if not is_option(word)]
        return with_model_values(composed(*options_of(words)), *values)

    return made


@pytest.fixture(scope="session")
def train_config():
    """train_config(FOLDER, CONFIGURATION, ["seed=1", ...]): what `sdtrain` does with the folder and
    the configuration once Hydra has composed it of what is typed, in this process."""
    from sdtrain.config.boundary import error_boundary
    from sdtrain.config.overrides import prepare_arguments
    from sdtrain.config.precheck import precheck_config
    from sdtrain.runs.lock import hold_run_folder
    from sdtrain.runs.start import check_start
    from sdtrain.training.run import train

    def run(folder: Path, config: dict, words: list[str]) -> Result:
        typed = prepare_arguments(words)
        out = io.StringIO()
        err = io.StringIO()
        code = 0
        folder.mkdir(parents=True, exist_ok=True)
        with _undone(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            sys.argv[:] = ["sdtrain", *typed]
            try:
                with error_boundary("train", "hydra.run.dir"):
                    with hold_run_folder(folder, has_timestamp=False) as locked:
                        prechecked = precheck_config(config, typed)
                        check_start(locked, prechecked.resume, prechecked.has_first_stage)
                        train(prechecked, locked.path)
            except SystemExit as left:
                code = left.code
        return Result(code or 0, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def train_tiny(tiny, tiny_config, train_config):
    """train_tiny(FOLDER, "seed=1", ...): the same, of a tiny run with these words."""

    def run(folder: Path, *words: str) -> Result:
        return train_config(folder, tiny_config(*words), tiny(*words))

    return run


class Command:
    """A running command, the leader of its process group."""

    def __init__(self, answers, folder: Path) -> None:
        self.answers = answers
        self.folder = folder
        self.code: int | None = None
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
        return Result(self.code, self.said(), self.said("stderr"), self.pid)

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
    """start("sdtrain", "seed=1", ..., cwd=FOLDER, env={...}) -> Command, a process of its own. One
    at a time.

    before=f"{__file__}:CALL()" calls a function of the test's file in that process, and in each
    rank that it starts, before the command begins.
    """
    home = tmp_path_factory.mktemp("home")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "PYTEST"))}
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
        server = request.getfixturevalue("server")
        folder = tmp_path_factory.mktemp("command")
        given = {"HOME": str(home), "OMP_NUM_THREADS": "1", "BEFORE": before}
        job = {
            "argv": [str(Path(sysconfig.get_path("scripts")) / name), *words],
            "cwd": str(cwd or folder),
            "env": kept | given | (env or {}),
            "output": str(folder),
        }
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        latest = Command(server.stdout, folder)
        return latest

    yield run
    if latest is not None:
        latest.end()


@pytest.fixture(scope="session")
def command(start):
    """The same, to its end."""

    def run(name: str, *words: str, **given) -> Result:
        return start(name, *words, **given).wait()

    return run


@pytest.fixture(scope="session")
def tiny_run(here, tiny, tmp_path_factory):
    """The folder of a finished run. Not to be changed: other tests read it too."""
    run = tmp_path_factory.mktemp("tiny") / "run"
    result = here("sdtrain", *tiny(), f"hydra.run.dir={run}")
    assert result.code == 0, result.err
    return run


@pytest.fixture
def run_of(train_tiny, tmp_path):
    """run_of(NAME, "seed=1", ...) -> the folder of that name, in which a run has finished."""

    def run(name: str, *words: str) -> Path:
        folder = tmp_path / name
        result = train_tiny(folder, *words)
        assert result.code == 0, result.err
        return folder

    return run


@pytest.fixture(scope="session")
def saved():
    """saved(RUN) -> every tensor of its newest checkpoint by name: weights, EMA, and the
    optimizer's state."""
    return lambda run: tensors(newest(run))


@pytest.fixture
def own_part(tmp_path, monkeypatch):
    """own_part(GROUP/NAME, PACKAGE, code, yaml) -> the word by which Hydra finds it.

    A part of a user's own: a package on Python's path, and a yaml in a folder of configurations
    outside of sdtrain.
    """
    packages = []

    def make(option: str, package: str, code: str, yaml: str) -> str:
        folder = tmp_path / "packages" / package
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(code)
        path = tmp_path / "configs" / f"{option}.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(yaml)
        monkeypatch.syspath_prepend(tmp_path / "packages")
        packages.append(package)
        return f"hydra.searchpath=[file://{tmp_path}/configs]"

    yield make
    for package in packages:
        sys.modules.pop(package, None)
