"""The default experiment, of a small network and shortened: whole, or with a mishap. And who still
works on a run."""

import subprocess
import time
from pathlib import Path

import mishaps
import pytest
from mishaps import BATCH
from reading import SMALL

SHORT = [
    *SMALL,
    "trainer.accelerator=cpu",
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
def whole(train, tmp_path_factory):
    """The run to which nothing happens, with all its checkpoints."""
    run = tmp_path_factory.mktemp("whole") / "run"
    result = train(run, "checkpoint.keep=6")
    assert result.code == 0, result.err
    return run


@pytest.fixture(scope="session")
def processes_of():
    """processes_of(RUN) -> command lines of the processes that still work on this run, up to 30 s
    later."""

    def found(run: Path) -> list[str]:
        end = time.monotonic() + 30
        while True:
            # Without -ww, ps may cut long command lines off.
            ps = subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True)
            working = [line for line in ps.stdout.splitlines() if str(run) in line]
            if not working:
                return []
            if time.monotonic() > end:
                return working
            time.sleep(0.1)

    return found
