"""The default experiment, of a small network and shortened: whole, or with a mishap. And who still
works on a run."""

import subprocess
import time
from pathlib import Path

import mishaps
import pytest
from mishaps import BATCH
from reading import SMALL, with_model_values

SHORT = [
    *SMALL,
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "trainer.threads=1",
    "logger=none",
    "data.num_workers=1",
    "callbacks.samples.every=0",
    "validation.every=0",
    f"trainer.max_images={6 * BATCH}",
    f"trainer.log_every={6 * BATCH}",
    f"checkpoint.every={BATCH}",
    "callbacks.noise_levels.num_images=2",
    "looks.share=null",
]


@pytest.fixture(scope="session")
def train(command):
    """train(RUN, "seed=1", ..., before="CALL()"): the experiment in a process of its own, to its
    end.

    CALL is of tests/mishaps.py.
    """

    def run(folder: Path, *words: str, before: str = ""):
        call = f"{mishaps.__file__}:{before}" if before else ""
        return command("sdtrain", *SHORT, *words, f"hydra.run.dir={folder}", before=call)

    return run


@pytest.fixture(scope="session")
def train_here(composed, train_config):
    """The same in this process, and without Hydra's command line."""

    def run(folder: Path, *words: str, before: str = ""):
        typed = [*SHORT, *words]
        values = [word for word in typed if word != "logger=none"]
        config = with_model_values(composed("logger=none"), *values)
        with mishaps.undone():
            eval(before or "None", vars(mishaps))
            return train_config(folder, config, typed)

    return run


@pytest.fixture(scope="session")
def whole(train_here, tmp_path_factory):
    """The run to which nothing happens, with all its checkpoints."""
    run = tmp_path_factory.mktemp("whole") / "run"
    result = train_here(run, "checkpoint.keep=6")
    assert result.code == 0, result.err
    return run


def members(group: int) -> list[str]:
    """What is known of its processes that have not ended."""
    ps = subprocess.run(["ps", "-eo", "pgid,stat,pid,args"], capture_output=True, text=True)
    found = []
    for line in ps.stdout.splitlines()[1:]:
        number, state, _ = line.split(maxsplit=2)
        if int(number) == group and not state.startswith("Z"):
            found.append(line)
    return found


@pytest.fixture(scope="session")
def found_by(tiny_config):
    """found_by("schedule=linear", "seed=1", ...) -> the run below the working directory that
    resume=auto would go on with."""
    from sdtrain.config.precheck import precheck_config
    from sdtrain.training.resume import newest_unfinished

    def found(*words: str) -> Path | None:
        return newest_unfinished(precheck_config(tiny_config(*words), words))

    return found


@pytest.fixture(scope="session")
def processes_of():
    """processes_of(RESULT) -> the processes of a command that still work, up to 30 s after it has
    ended."""

    def found(result) -> list[str]:
        end = time.monotonic() + 30
        while members(result.group) and time.monotonic() < end:
            time.sleep(0.1)
        return members(result.group)

    return found
