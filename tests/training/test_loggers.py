"""What loggers get, read back from what they wrote; and that a run does not depend on them."""

import contextlib
import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sdtrain.runs.checkpoint import damage, published, read_trainer, read_weights
from sdtrain.training.loggers.wandb import _run_id
from sdtrain.training.optimisation import Optimisation

PROMPTS = [
    "a large red circle on a green background",
    "a large green square on an orange background",
]


def not_json(constant: str):
    raise ValueError(f"{constant} is no JSON")


def lines(run) -> list[dict]:
    return [
        json.loads(line, parse_constant=not_json)
        for line in (run / "metrics.jsonl").read_text().splitlines()
    ]


def run_id(run) -> str:
    return (run / "wandb" / "id").read_text()


def wandb_records(run) -> tuple[Path, list[dict], list[dict]]:
    """(folder, history items, all records) of the only offline run below `run`."""
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    command = [
        str(Path(sysconfig.get_path("scripts")) / "wandb"),
        "leet",
        "inspect",
        "--json",
        str(file),
    ]
    records = [
        json.loads(line)
        for line in subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout.splitlines()
    ]
    return (
        file.parent,
        [record["history"]["item"] for record in records if "history" in record],
        records,
    )


@pytest.fixture(scope="module")
def wandb_run(command, tiny, tmp_path_factory):
    run = tmp_path_factory.mktemp("wandb") / "run"
    result = command("sdtrain", *tiny("logger=wandb", "guidance_scale=2.5"), f"hydra.run.dir={run}")
    assert result.code == 0, result.err
    return run, result.out, *wandb_records(run)


def test_wandb_offline_says_so_in_one_line(wandb_run):
    run, said, folder, _, records = wandb_run
    (line,) = [line for line in said.splitlines() if "offline" in line]
    (look, leet), (upload, pattern) = re.findall(r"`wandb (\w+) ([^`]+)`", line)
    assert (look, leet, upload) == ("leet", str(folder), "sync") and [
        str(path) for path in run.glob(str(Path(pattern).relative_to(run)))
    ] == [str(folder)]
    assert [record["exit"]["exit_code"] for record in records if "exit" in record] == [0]
    assert folder.name.endswith(f"-{run_id(run)}") and {
        record["run"]["run_id"] for record in records if "run" in record
    } == {run_id(run)}
    assert {path.name for path in run.iterdir()} == {
        "wandb",
        "checkpoints",
        "samples",
        "metrics.jsonl",
        "config.yaml",
        "status.json",
    }


def holding(run, word: bytes) -> list[Path]:
    return [
        path for path in (run / "wandb").rglob("*") if path.is_file() and word in path.read_bytes()
    ]


def test_wandb_does_not_hold_the_command_line(wandb_run):
    assert not holding(wandb_run[0], b"hydra.run.dir=") and holding(wandb_run[0], b"guidance_scale")


ASIDE = """
import sys
from pathlib import Path
import wandb
from sdtrain.training.loggers import wandb as loggers

settings = wandb.Settings
wandb.Settings = lambda **given: settings(**given | {"x_disable_meta": False})
loggers.close(loggers.wandb(project="sdtrain", mode="offline", run_dir=Path(sys.argv[1]), name="aside", resumed=False), failed=False)
"""


@pytest.mark.slow
def test_left_to_itself_it_would(tmp_path):
    """The twin."""
    (tmp_path / "aside.py").write_text(ASIDE)
    subprocess.run(
        [sys.executable, tmp_path / "aside.py", tmp_path, "hydra.run.dir=typed"], check=True
    )
    assert holding(tmp_path, b"hydra.run.dir=")


def test_wandb_holds_every_number(wandb_run, tiny_run):
    run, _, _, items, _ = wandb_run
    assert [(line["images_seen"], sorted(line)) for line in lines(run)] == [
        (line["images_seen"], sorted(line)) for line in lines(tiny_run)
    ]
    for line in lines(run):
        numbers = {
            key: value
            for key, value in line.items()
            if key != "seconds" and not isinstance(value, list)
        }
        assert [item for item in items if numbers.items() <= item.items()], line
        levels = {
            f"{key}.values": [each or 0 for each in value]
            for key, value in line.items()
            if isinstance(value, list)
        }
        assert [
            item
            for item in items
            if levels.items() <= item.items() and item["images_seen"] == line["images_seen"]
        ], line
    assert {"train/loss", "train/lr", "train/images_per_second", "validation/loss"} <= {
        key for item in items for key in item
    }


def test_wandb_holds_the_resolved_configuration(wandb_run):
    (config,) = [record["config"]["update"] for record in wandb_run[4] if "config" in record]
    assert config["schedule"] == {
        "_target_": "sdtrain.schedules.scaled_linear.scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "num_timesteps": 1000,
    }
    assert (
        config["model"]["unet"]["context_dim"] == 16
        and config["guidance_scale"] == 2.5
        and len(config["model"]["autoencoder"]["sha256"]) == 64
    )


def test_wandb_counts_in_images_seen(wandb_run):
    _, _, _, items, records = wandb_run
    assert "images_seen" in [
        record["metric"].get("step_metric") for record in records if "metric" in record
    ]
    assert all("images_seen" in item for item in items)


def test_wandb_holds_the_grids(wandb_run):
    run, _, folder, items, _ = wandb_run
    grids = {item["images_seen"]: item for item in items if "samples/grid.path" in item}
    assert grids.keys() == {32, 64}
    for key, seen, file in [
        ("grid", 64, "grid-000000064"),
        ("grid", 32, "grid-000000032"),
        ("strip", 64, "strip-000000064"),
        ("forward", 0, "forward"),
    ]:
        (item,) = [
            item for item in items if f"samples/{key}.path" in item and item["images_seen"] == seen
        ]
        assert item[f"samples/{key}._type"] == "image-file"
        kept, logged = (
            np.array(Image.open(path))
            for path in (
                run / "samples" / f"{file}.png",
                folder / "files" / item[f"samples/{key}.path"],
            )
        )
        assert np.array_equal(kept, logged) and kept.std() > 10


def test_wandb_holds_the_table(wandb_run):
    _, _, folder, items, _ = wandb_run
    tables = [item for item in items if item.get("samples/table._type") == "table-file"]
    assert [item["images_seen"] for item in tables] == [32, 64]
    table = json.loads((folder / "files" / tables[-1]["samples/table.path"]).read_text())
    assert table["columns"] == ["images_seen", "prompt", "seed", "guidance_scale", "image"]
    assert [row[:4] for row in table["data"]] == [
        [64, PROMPTS[0], 0, 2.5],
        [64, PROMPTS[1], 1, 2.5],
    ]
    pictures = [
        Image.open(folder / "files" / name)
        for name in tables[-1]["samples/table_pictures.filenames"]
    ]
    assert [picture.size for picture in pictures] == [(32, 32), (32, 32)] and pictures[
        0
    ].tobytes() != pictures[1].tobytes()
    assert all(
        prompt in caption
        for prompt, caption in zip(
            PROMPTS, tables[-1]["samples/table_pictures.captions"], strict=True
        )
    )


def finishes_like(run, result, tiny_run, seconds) -> None:
    assert result.code == 0, result.err
    assert [line["images_seen"] for line in lines(run)] == [
        line["images_seen"] for line in lines(tiny_run)
    ]
    assert [line["train/loss"] for line in lines(run) if "train/loss" in line] == [
        line["train/loss"] for line in lines(tiny_run) if "train/loss" in line
    ]
    assert seconds < 60


def timed(command, *words, **given):
    began = time.monotonic()
    return command(*words, **given), time.monotonic() - began


@pytest.mark.slow
def test_wandb_unreachable(command, tiny, tiny_run, wandb_run, tmp_path):
    online = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    result, seconds = timed(
        command, "sdtrain", *tiny("logger=wandb"), f"hydra.run.dir={tmp_path}/run", env=online
    )
    finishes_like(tmp_path / "run", result, tiny_run, seconds)
    assert "127.0.0.1 cannot be reached" in result.out and list(
        tmp_path.glob("run/wandb/offline-run-*")
    )


BLOCKED = """
import sys
import time
from sdtrain.training.loggers import wandb as loggers
from sdtrain.training.callbacks.metrics_log import MetricsLog
from sdtrain.commands.train import main

number, guarded = int(sys.argv.pop(1)), sys.argv.pop(1) == "guarded"
report, leave_out, logged_in, blocked = MetricsLog.report, loggers._leave_out, loggers.logged_in, []


def block(pid):
    blocked.append(pid)
    print("blocked", pid, time.monotonic(), flush=True)


def hitting(self, trainer, *numbers):
    if trainer.datamodule.images_seen == 32 and not blocked:
        import wandb
        process = wandb.setup()._connection._proc._process
        process.send_signal(number)
        block(process.pid)
    report(self, trainer, *numbers)


def starting():
    if not number:  # it is blocked from the start
        block(0)
    return logged_in()


def leaving(reason):
    leave_out(reason)
    print("warned", 0, time.monotonic(), flush=True)


MetricsLog.report, loggers._leave_out, loggers.logged_in = hitting, leaving, starting
if not guarded:
    loggers.failure = lambda call, limit: call() and None
main()
"""
SILENT = 0  # in place of a signal: wandb's host takes the connection and then says nothing


def blocked(tiny, tmp_path, number: int, kind: str) -> tuple[int, str, dict[str, float]]:
    """(exit code, stderr, seconds since wandb was blocked by `warned` and `ended`) of a run whose wandb process gets the signal when half of it is done."""
    (tmp_path / "blocked.py").write_text(BLOCKED)
    words = [
        sys.executable,
        tmp_path / "blocked.py",
        str(int(number)),
        kind,
        *tiny("logger=wandb"),
        f"hydra.run.dir={tmp_path}/run",
    ]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        mode = (
            {"WANDB_MODE": "offline"}
            if number
            else {
                "WANDB_API_KEY": "0" * 40,
                "WANDB_BASE_URL": f"http://127.0.0.1:{silent.getsockname()[1]}",
            }
        )
        kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
        with open(tmp_path / "out", "w") as out, open(tmp_path / "err", "w") as err:
            process = subprocess.Popen(words, stdout=out, stderr=err, env=kept | mode)
            while process.poll() is None and "blocked" not in (tmp_path / "out").read_text():
                time.sleep(0.05)
            try:
                process.wait(
                    40 if kind == "bare" else 150
                )  # unguarded, one that stands still is waited for without end
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    ended, said = time.monotonic(), (tmp_path / "out").read_text()
    times = {
        name: (int(pid), float(when))
        for name, pid, when in re.findall(r"^(blocked|warned) (\d+) (\S+)$", said, re.MULTILINE)
    }
    pid, began = times["blocked"]
    if number == signal.SIGSTOP and kind == "bare":
        os.kill(pid, signal.SIGKILL)
    return (
        process.returncode,
        (tmp_path / "err").read_text(),
        {"ended": ended - began} | {name: when - began for name, (_, when) in times.items()},
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "number",
    [SILENT, signal.SIGKILL, signal.SIGSTOP],
    ids=["silent host", "killed", "standing still"],
)
def test_a_run_whose_wandb_is_blocked_is_the_same(tiny, tiny_run, saved, tmp_path, number):
    """From its start or in mid-run: one warning within 10 s, and nothing else."""
    code, err, seconds = blocked(tiny, tmp_path, number, "guarded")
    assert code == 0 and "Traceback" not in err and err.count("sdtrain: wandb fails (") == 1, err
    assert 0 < seconds["warned"] < 10 and seconds["ended"] < 60
    assert [line["images_seen"] for line in lines(tmp_path / "run")] == [
        line["images_seen"] for line in lines(tiny_run)
    ]
    ours, theirs = saved(tmp_path / "run"), saved(tiny_run)
    assert ours.keys() == theirs.keys() and all(
        torch.equal(value, theirs[key]) for key, value in ours.items()
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (SILENT, 1, "CommError"),
        (signal.SIGKILL, 1, "Connection|Mailbox"),
        (signal.SIGSTOP, -signal.SIGKILL, ""),
    ],
)
def test_without_the_guard_it_ends_the_run_or_holds_it_up(tiny, tmp_path, number, code, said):
    """The twin."""
    left, err, seconds = blocked(tiny, tmp_path, number, "bare")
    assert left == code and re.search(said, err) and "warned" not in seconds, err
    assert (
        not (tmp_path / "run" / "metrics.jsonl").exists()
        or lines(tmp_path / "run")[-1]["images_seen"] == 32
    )


@contextlib.contextmanager
def wandb_host(leaves: bool):
    """(its environment, the requests it gets) of a host that answers as far as wandb asks; or one that is gone once the first number arrives."""
    asked: list[tuple[str, str]] = []

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(
                (
                    self.path,
                    self.rfile.read(int(self.headers["Content-Length"] or 0)).decode(
                        errors="replace"
                    ),
                )
            )
            if leaves and self.path.endswith("/file_stream"):
                host.server_close()
                return
            body = json.dumps(
                {"data": {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": []}}}
            ).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as host:
        threading.Thread(target=host.serve_forever, daemon=True).start()
        yield (
            {
                "WANDB_API_KEY": "0" * 40,
                "WANDB_BASE_URL": f"http://127.0.0.1:{host.server_address[1]}",
            },
            asked,
        )
        host.shutdown()


@pytest.mark.slow
def test_a_resumed_run_continues_the_same_wandb_run(command, tiny, tmp_path):
    """Begun offline, gone on with online: wandb's host is asked where the run of that id has stopped."""
    words = tiny(
        "logger=wandb",
        "lr_schedule=constant",
        "callbacks.samples.every=0",
        "validation.every=0",
        f"hydra.run.dir={tmp_path}/run",
    )
    assert command("sdtrain", *words, "trainer.max_images=16").code == 0
    begun = run_id(tmp_path / "run")
    with wandb_host(leaves=False) as (online, asked):
        result = command("sdtrain", *words, "trainer.max_images=32", "resume=must", env=online)
    assert result.code == 0 and "sdtrain: wandb" not in result.err, result.err
    resumed = [
        json.loads(body)["variables"]["name"]
        for _, body in asked
        if "query RunResumeStatus" in body
    ]
    assert resumed == [run_id(tmp_path / "run")] == [begun] and any(
        path.endswith(f"/{begun}/file_stream") for path, _ in asked
    )
    numbers = "".join(body for path, body in asked if path.endswith("/file_stream"))
    assert '\\"images_seen\\":32' in numbers and '\\"images_seen\\":16' not in numbers


def test_a_run_that_starts_anew_is_another_to_wandb(tmp_path):
    first = _run_id(tmp_path, resumed=False)
    assert _run_id(tmp_path, resumed=True) == first and _run_id(tmp_path, resumed=False) != first
    assert _run_id(tmp_path, resumed=True) != first


@pytest.mark.slow
def test_a_run_whose_host_is_gone_in_mid_run_is_the_same(command, tiny, tiny_run, saved, tmp_path):
    """wandb's process goes on trying; the run hears of it at its end, and waits for less than 10 s."""
    with wandb_host(leaves=True) as (online, asked):
        result, seconds = timed(
            command, "sdtrain", *tiny("logger=wandb"), f"hydra.run.dir={tmp_path}/run", env=online
        )
    finishes_like(tmp_path / "run", result, tiny_run, seconds)
    assert (
        any(path.endswith("/file_stream") for path, _ in asked)
        and result.err.count("sdtrain: wandb fails (no answer in ") == 1
    )
    ours, theirs = saved(tmp_path / "run"), saved(tiny_run)
    assert ours.keys() == theirs.keys() and all(
        torch.equal(value, theirs[key]) for key, value in ours.items()
    )


@pytest.mark.slow
def test_wandb_disabled(command, tiny, tmp_path):
    result = command(
        "sdtrain",
        *tiny("logger=wandb", "trainer.max_images=8"),
        f"hydra.run.dir={tmp_path}/run",
        env={"WANDB_MODE": "disabled"},
    )
    assert result.code == 0 and not (tmp_path / "run" / "wandb").exists(), result.err


def test_csv(here, tiny, tmp_path):
    run = tmp_path / "run"
    assert (
        here("sdtrain", *tiny("logger=csv", "trainer.max_images=32"), f"hydra.run.dir={run}").code
        == 0
    )
    with open(run / "csv" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    written = [
        (row["images_seen"], row[key])
        for key in ("train/loss", "validation/loss")
        for row in rows
        if row[key]
    ]
    assert written == [
        (str(line["images_seen"]), str(line[key]))
        for key in ("train/loss", "validation/loss")
        for line in lines(run)
        if key in line
    ]


def test_csv_of_a_resumed_run_keeps_what_was_there(here, tiny, tmp_path):
    run, words = tmp_path / "run", ["logger=csv", "lr_schedule=constant"]
    assert here("sdtrain", *tiny(*words, "trainer.max_images=32"), f"hydra.run.dir={run}").code == 0
    assert (
        here(
            "sdtrain", *tiny(*words, "trainer.max_images=64", "resume=must"), f"hydra.run.dir={run}"
        ).code
        == 0
    )
    with open(run / "csv" / "metrics.csv") as file:
        assert sorted({int(row["images_seen"]) for row in csv.DictReader(file)}) == [16, 32, 48, 64]


def test_tensorboard(command, tiny, tmp_path):
    result = command("sdtrain", *tiny("logger=tensorboard"), f"hydra.run.dir={tmp_path}/run")
    assert result.code == 0, result.err
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    for key in ("train/loss", "train/lr", "validation/loss"):
        wanted = [
            (line["images_seen"], line[key]) for line in lines(tmp_path / "run") if key in line
        ]
        assert [event.step for event in events.Scalars(key)] == [seen for seen, _ in wanted]
        np.testing.assert_allclose(
            [event.value for event in events.Scalars(key)],
            [value for _, value in wanted],
            rtol=1e-6,
        )
    assert [image.step for image in events.Images("samples/grid")] == [32, 64]


@pytest.mark.slow
def test_tensorboard_of_a_resumed_run_has_each_step_once(here, tiny, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, words = tmp_path / "run", ["logger=tensorboard", "callbacks.samples.every=0"]
    assert here("sdtrain", *tiny(*words), f"hydra.run.dir={run}").code == 0
    shutil.rmtree(published(run)[-1])  # as if it had been killed before it was written
    assert here("sdtrain", *tiny(*words, "resume=must"), f"hydra.run.dir={run}").code == 0
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [16, 32, 48, 64]


WILD = [
    "optimizer.lr=1e30",
    "trainer.log_every=64",
    "checkpoint.every=8",
    "checkpoint.keep=8",
    "callbacks.samples.every=0",
]


@pytest.mark.parametrize("fused", ["true", "false"])
def test_divergence_ends_with_4_and_moves_no_weight_to_nan(here, tiny, tmp_path, fused):
    run = tmp_path / "run"
    result = here("sdtrain", *tiny(*WILD, f"optimizer.fused={fused}"), f"hydra.run.dir={run}")
    assert (
        result.code == 4 and "optimizer.lr" in result.paragraph and "not finite" in result.paragraph
    ), result.err
    assert json.loads((run / "status.json").read_text())["state"] == "diverged"
    assert published(run) and damage(published(run)[-1]) is None
    for name in ("model", "ema"):
        assert all(
            value.isfinite().all() for value in read_weights(published(run)[-1], name).values()
        )
    (line,) = (line for line in lines(run) if "train/loss" in line)
    assert (
        line["images_seen"] == int(published(run)[-1].name) + 8 < 64
        and line["train/gradient_norm"] is None
    )  # before the next save, not at the next line


SICK = """
import torch


class Sick(torch.nn.Conv2d):
    \"\"\"Its answer to the third batch of a run, after a look at its shape, is not a number.\"\"\"

    def __init__(self, *, latent_channels: int) -> None:
        super().__init__(latent_channels, latent_channels, 1)
        self.calls = 0

    def forward(self, x, timestep, context):
        self.calls += self.training
        return super().forward(x) * (float("nan") if self.training and self.calls == 4 else 1.0)
"""


@pytest.mark.parametrize("allowed", ["null", "0", "1"])
def test_one_sick_batch_ends_the_run_or_is_left_out(here, tiny, tmp_path, monkeypatch, allowed):
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "sick_network.py").write_text(SICK)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    words = tiny(
        "callbacks.samples.every=0",
        "validation.every=0",
        "trainer.log_every=8",
        f"trainer.max_skipped={allowed}",
    )
    words = [word for word in words if not word.startswith("model.unet.")] + [
        "model.unet._target_=sick_network.Sick"
    ]
    run = tmp_path / "run"
    result = here("sdtrain", *words, "checkpoint.every=8", f"hydra.run.dir={run}")
    if allowed == "1":
        assert result.code == 0, result.err
        assert lines(run)[-1]["train/skipped_steps"] == 1 and lines(run)[-1]["images_seen"] == 64
        assert (
            read_trainer(published(run)[-1])["ema_steps"] == 7
            and read_trainer(published(run)[-1])["skipped_steps"] == 1
        )
        return
    assert result.code == 4, result.err
    assert (
        "images (samples 16, 17, 18, 19, 20, 21, 22, 23, t = "
        if allowed == "null"
        else "trainer.max_skipped=0"
    ) in result.paragraph
    newest = published(run)[-1]
    assert newest.name == f"{16:012d}" and all(
        value.isfinite().all()
        for name in ("model", "ema")
        for value in read_weights(newest, name).values()
    )


def test_without_the_guard_they_would_be_nan(here, tiny, tmp_path, monkeypatch):
    """The twin."""

    def unguarded(self, optimizer, loss):
        self.judged = loss.new_zeros(()), loss.new_zeros(())
        return nn.utils.clip_grad_norm_(
            [p for group in optimizer.param_groups for p in group["params"]], self.gradient_clip
        )

    monkeypatch.setattr(Optimisation, "clip", unguarded)
    run = tmp_path / "run"
    result = here("sdtrain", *tiny(*WILD), f"hydra.run.dir={run}")
    assert result.code == 4 and "it is not saved" in result.paragraph, (
        result.err
    )  # the second guard, which looks at what is written


def test_a_divergence_before_the_first_checkpoint_does_not_speak_of_one(here, tiny, tmp_path):
    result = here(
        "sdtrain",
        *tiny("optimizer.lr=1e30", "checkpoint.every=1000"),
        f"hydra.run.dir={tmp_path}/run",
    )
    assert (
        result.code == 4
        and not (tmp_path / "run" / "checkpoints").exists()
        and "last checkpoint is good" not in result.paragraph
    )
