"""What rank 0 says and does about children that end, or do not: real processes, but no training."""

import faulthandler
import os
import subprocess
import threading
import time

import pytest
from lightning.pytorch.strategies.launchers import subprocess_script

from sdtrain.config.launch import RANK_0
from sdtrain.training.ranks import Ranks


@pytest.fixture
def make_ranks(tmp_path, monkeypatch):
    """make_ranks("exit 3", ..., rank=0) -> the watch over children that run these shell scripts, at
    96 images."""
    for name in ("_launch_process_observer", "_hydra_subprocess_cmd"):
        monkeypatch.setattr(subprocess_script, name, getattr(subprocess_script, name))
    monkeypatch.setenv(RANK_0, "")
    children = []

    def made(*scripts: str, rank: int = 0, timeout: float = 2.0) -> Ranks:
        ranks = Ranks(
            rank=rank,
            timeout=timeout,
            run_dir=tmp_path,
            config="",
            precision="32-true",
            check_configs=lambda configs: None,
            end_process=lambda code, paragraph: None,
        )
        ranks.images_seen = 96
        ranks.world_size = len(scripts) + 1
        ranks.children = [subprocess.Popen(["sh", "-c", script]) for script in scripts]
        children.extend(ranks.children)
        return ranks

    yield made
    for child in children:
        child.kill()
        child.wait()


LOGGED = "DataError: The picture x.png cannot be decoded.\nTraceback\n"


@pytest.mark.parametrize(
    ("script", "log", "code", "said"),
    [
        ("kill -KILL $$", None, 6, "Rank 1 was killed by SIGKILL at 96 images."),
        ("exit 3", LOGGED, 3, "At 96 images, on rank 1: DataError: The picture x.png cannot be"),
        ("exit 2", LOGGED, 2, "At 96 images, on rank 1: "),
        ("exit 1", LOGGED, 6, "At 96 images, on rank 1: "),
        ("exit 1", None, 6, "Rank 1 exited with code 1 at 96 images."),
        ("exit 0", None, 6, "Rank 1 exited with code 0 at 96 images."),
        ("kill -TERM $$", None, 143, "Rank 1 was ended by SIGTERM while it started."),
        ("sleep 0.3; exit 4", LOGGED, 4, "At 96 images, on rank 1: "),
        ("exit 6", LOGGED, 6, "Rank 0 has lost its connection to the others at 96 images"),
    ],
)
def test_how_a_rank_ended_decides_code_and_paragraph(make_ranks, script, log, code, said):
    """Whether rank 0 sees it by an exit or by a connection that is lost."""
    for error in (None, RuntimeError("Connection closed by peer")):
        ranks = make_ranks(script)
        if log:
            ranks.run.error_log(1).write_text(log)
        left, paragraph = ranks.explain(error)
        assert left == code, paragraph
        assert paragraph.startswith(said)
        assert ranks.ending.is_set()


def test_a_log_of_an_earlier_run_is_not_quoted(make_ranks):
    ranks = make_ranks("exit 3")
    ranks.run.error_log(1).write_text(LOGGED)
    os.utime(ranks.run.error_log(1), (1, 1))
    assert ranks.explain(None) == (3, "Rank 1 exited with code 3 at 96 images.")


def test_of_several_ranks_the_one_with_an_error_of_its_own_is_named(make_ranks):
    ranks = make_ranks("exit 6", "sleep 0.2; exit 3", "sleep 60")
    assert ranks.explain(None) == (3, "Rank 2 exited with code 3 at 96 images.")


def test_an_error_of_its_own_is_not_blamed_on_another_rank(make_ranks):
    error = RuntimeError("something of its own")
    said = "RuntimeError: something of its own"
    assert make_ranks("sleep 60").explain(error) == (6, f"On rank 0: {said}")
    assert make_ranks(rank=1).explain(error) == (1, said)


def ended_by(ranks: Ranks) -> tuple[int, str]:
    """(code, paragraph) with which the watching thread ends the process."""
    found = []
    ended = threading.Event()

    def end_process(code: int, paragraph: str) -> None:
        found.append((code, paragraph))
        ranks.ending.set()
        ended.set()

    ranks.end_process = end_process
    ranks.watch(ranks.children)
    assert ended.wait(20)
    ranks.thread.join(5)
    assert len(found) == 1
    return found[0]


def test_the_watch_ends_the_run_where_a_child_has_failed(make_ranks):
    ranks = make_ranks("exit 3", "sleep 60", timeout=0.5)
    code, paragraph = ended_by(ranks)
    assert (code, paragraph) == (3, "Rank 1 exited with code 3 at 96 images.")
    assert ranks.children[1].poll() is not None  # and leaves none behind


def test_the_watch_ends_a_run_that_makes_no_step_and_says_where_each_rank_is(make_ranks):
    """Rank 0 by its stack; rank 1, which the system has stopped, has written none."""
    ranks = make_ranks("kill -STOP $$", timeout=0.5)
    with open(ranks.run.stack(0), "w") as file:

        def waits_for_rank_1() -> None:
            faulthandler.dump_traceback(file)

        waits_for_rank_1()
    ranks.run.stack(1).touch()
    ranks.last_step = time.monotonic()
    code, paragraph = ended_by(ranks)
    assert code == 6
    assert paragraph.startswith("No optimizer step has ended for 0.5 s, at 96 images: rank 0 at ")
    assert "in waits_for_rank_1" in paragraph
    assert "; rank 1 does not respond. " in paragraph and "strategy.timeout" in paragraph
    assert ranks.children[0].poll() is not None
    assert ranks.run.stack(0).exists() and not ranks.run.stack(1).exists()


def test_the_watch_leaves_a_run_alone_that_makes_steps(make_ranks):
    """The twin of the two."""
    ranks = make_ranks("sleep 60", timeout=0.4)
    ends = []
    ranks.end_process = lambda *given: ends.append(given)
    ranks.watch(ranks.children)
    for _ in range(10):
        ranks.last_step = time.monotonic()
        time.sleep(0.08)
    ranks.ending.set()
    ranks.thread.join(5)
    assert not ends and ranks.children[0].poll() is None
