"""A run does not depend on wandb: unreachable, silent, killed, stopped or gone in mid-run, it costs
a warning."""

import contextlib
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from reading import lines, same

from sdtrain.training.callbacks.metrics_log import MetricsLog
from sdtrain.training.loggers import wandb as wandb_logger
from sdtrain.training.loggers.wandb import failure_reason

LOGGED_IN = {"WANDB_API_KEY": "0" * 40}


def fails() -> None:
    raise OSError("gone\nwith a second line")


def test_a_call_that_fails_or_hangs_has_a_reason():
    waiting = threading.Event()
    assert failure_reason(lambda: None, 10.0) is None
    assert failure_reason(fails, 10.0) == "OSError: gone"
    assert "no answer" in failure_reason(waiting.wait, 0.05)
    waiting.set()


def images_seen(run: Path) -> list[int]:
    return [line["images_seen"] for line in lines(run)]


def losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in lines(run) if "train/loss" in line]


def finishes_like(run, result, tiny_run, seconds) -> None:
    assert result.code == 0, result.err
    assert images_seen(run) == images_seen(tiny_run)
    assert losses(run) == losses(tiny_run)
    assert seconds < 60


def timed(command, *words, **given):
    began = time.monotonic()
    return command(*words, **given), time.monotonic() - began


@pytest.mark.slow
def test_wandb_unreachable(command, tiny, tiny_run, tmp_path):
    run = tmp_path / "run"
    online = LOGGED_IN | {"WANDB_BASE_URL": "http://127.0.0.1:9"}
    words = [*tiny("logger=wandb"), f"hydra.run.dir={run}"]
    result, seconds = timed(command, "sdtrain", *words, env=online)
    finishes_like(run, result, tiny_run, seconds)
    assert "127.0.0.1 cannot be reached" in result.out
    assert list(run.glob("wandb/offline-run-*"))


SILENT = 0
"""In place of a signal: wandb's host takes the connection and then answers nothing."""


def tell(what: str, pid: int) -> None:
    print(what, pid, time.monotonic(), flush=True)


def block_wandb(number: int, is_guarded: bool) -> None:
    """In the run's process: wandb's gets the signal when half of the run is done, or is blocked
    from the start."""
    log_metrics = MetricsLog.log_metrics
    switch_off = wandb_logger._switch_off
    logged_in = wandb_logger.logged_in
    blocked = []

    def signalled(self, trainer, progress, *numbers):
        if number and progress.images_seen == 32 and not blocked:
            import wandb

            process = wandb.setup()._connection._proc._process
            process.send_signal(number)
            blocked.append(process.pid)
            tell("blocked", process.pid)
        log_metrics(self, trainer, progress, *numbers)

    def starting():
        if not number:
            tell("blocked", 0)
        return logged_in()

    def leaving(reason):
        switch_off(reason)
        tell("warned", 0)

    MetricsLog.log_metrics = signalled
    wandb_logger._switch_off = leaving
    wandb_logger.logged_in = starting
    if not is_guarded:
        wandb_logger.failure_reason = lambda call, limit: call() and None


def told(running) -> dict[str, tuple[int, float]]:
    """{what: (process, time)}"""
    found = re.findall(r"^(blocked|warned) (\d+) (\S+)$", running.said(), re.MULTILINE)
    return {what: (int(pid), float(when)) for what, pid, when in found}


@pytest.fixture
def start_blocked(start, tiny, tmp_path):
    """start_blocked(number, is_guarded) -> the run whose wandb is blocked, as soon as it is."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        online = LOGGED_IN | {"WANDB_BASE_URL": f"http://127.0.0.1:{silent.getsockname()[1]}"}

        def started(number: int, is_guarded: bool):
            running = start(
                "sdtrain",
                *tiny("logger=wandb"),
                f"hydra.run.dir={tmp_path}/run",
                env={"WANDB_MODE": "offline"} if number else online,
                before=f"{__file__}:block_wandb({int(number)}, {is_guarded})",
            )
            running.until(lambda: "blocked" in told(running))
            return running

        yield started


@pytest.mark.slow
@pytest.mark.parametrize(
    "number",
    [SILENT, signal.SIGKILL, signal.SIGSTOP],
    ids=["silent host", "killed", "standing still"],
)
def test_a_run_whose_wandb_is_blocked_is_the_same(start_blocked, tiny_run, saved, tmp_path, number):
    """From its start or in mid-run: one warning within 10 s, and nothing else."""
    run = tmp_path / "run"
    running = start_blocked(number, True)
    result = running.wait()
    ended = time.monotonic()
    assert result.code == 0, result.err
    assert "Traceback" not in result.err and result.err.count("sdtrain: wandb failed (") == 1
    _, blocked_at = told(running)["blocked"]
    _, warned_at = told(running)["warned"]
    assert 0 < warned_at - blocked_at < 10 and ended - blocked_at < 60
    assert images_seen(run) == images_seen(tiny_run)
    assert same(saved(run), saved(tiny_run))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "standing"])
def test_without_the_guard_it_ends_the_run_or_holds_it_up(start_blocked, tmp_path, number):
    """The twin."""
    running = start_blocked(number, False)
    pid, blocked_at = told(running)["blocked"]
    if number == signal.SIGSTOP:
        while time.monotonic() < blocked_at + 12:
            os.kill(running.pid, 0)  # it is there
            time.sleep(0.2)
        os.kill(running.pid, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
    result = running.wait()
    assert result.code == (1 if number == signal.SIGKILL else -signal.SIGKILL), result.err
    assert number == signal.SIGSTOP or re.search("Connection|Mailbox", result.err), result.err
    assert "warned" not in told(running)
    written = (tmp_path / "run" / "metrics.jsonl").exists()
    assert not written or images_seen(tmp_path / "run")[-1] == 32


ANSWER = {"data": {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": []}}}


@contextlib.contextmanager
def wandb_host(leaves: bool) -> Iterator[tuple[dict[str, str], list[tuple[str, str]]]]:
    """(environment, requests it gets) of a host that answers as far as wandb asks.

    leaves: it is gone once the first number arrives.
    """
    asked: list[tuple[str, str]] = []

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"] or 0))
            asked.append((self.path, content.decode(errors="replace")))
            if leaves and self.path.endswith("/file_stream"):
                host.server_close()
                return
            body = json.dumps(ANSWER).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as host:
        threading.Thread(target=host.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{host.server_address[1]}"
        yield LOGGED_IN | {"WANDB_BASE_URL": url}, asked
        host.shutdown()


@pytest.mark.slow
def test_a_resumed_run_continues_the_same_wandb_run(command, tiny, tmp_path):
    """Begun offline, gone on with online: wandb's host is asked where the run of that id has
    stopped."""
    run = tmp_path / "run"
    words = tiny(
        "logger=wandb",
        "lr_schedule=constant",
        "callbacks.samples.every=0",
        "validation.every=0",
        f"hydra.run.dir={run}",
    )
    assert command("sdtrain", *words, "trainer.max_images=16").code == 0
    begun = (run / "wandb" / "id").read_text()
    with wandb_host(leaves=False) as (online, asked):
        result = command("sdtrain", *words, "trainer.max_images=32", "resume=must", env=online)
    assert result.code == 0 and "sdtrain: wandb" not in result.err, result.err
    queries = [json.loads(body) for _, body in asked if "query RunResumeStatus" in body]
    assert [query["variables"]["name"] for query in queries] == [begun]
    assert (run / "wandb" / "id").read_text() == begun
    assert any(path.endswith(f"/{begun}/file_stream") for path, _ in asked)
    numbers = "".join(body for path, body in asked if path.endswith("/file_stream"))
    assert '\\"images_seen\\":32' in numbers and '\\"images_seen\\":16' not in numbers


@pytest.mark.slow
def test_a_run_whose_host_is_gone_in_mid_run_is_the_same(command, tiny, tiny_run, saved, tmp_path):
    """wandb's process goes on trying; the run hears of it at its end, and waits for less than 10
    s."""
    run = tmp_path / "run"
    words = [*tiny("logger=wandb"), f"hydra.run.dir={run}"]
    with wandb_host(leaves=True) as (online, asked):
        result, seconds = timed(command, "sdtrain", *words, env=online)
    finishes_like(run, result, tiny_run, seconds)
    assert any(path.endswith("/file_stream") for path, _ in asked)
    assert result.err.count("sdtrain: wandb failed (no answer in ") == 1
    assert same(saved(run), saved(tiny_run))
