"""The arms of a sweep: what they are called, how each is started, and whether it has been done."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf
from yaml import YAMLError

OUTPUT = "output.txt"
RANKS = (
    "LOCAL_RANK",
    "RANK",
    "WORLD_SIZE",
    "NODE_RANK",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
)


@dataclass
class Arm:
    """One run of a sweep. words: what sdtrain is given; cfg: what they compose to."""

    name: str
    folder: Path
    words: list[str]
    cfg: dict
    process: subprocess.Popen | None = None
    slot: str | None = None
    began: float = 0.0
    before: int = 0  # bytes of its output by earlier processes
    code: int | None = None

    def finished(self) -> bool:
        """Whether it has been done before."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return (
                json.loads((self.folder / "status.json").read_text())["state"] == "finished"
                and (self.folder / "config.yaml").is_file()
            )
        return False

    def begun_otherwise(self) -> dict[str, tuple]:
        """{key: (old, new)} of what makes this another run than the one that lies in its folder, if one does. Budgets too: arms have the same."""
        from sdtrain.redaction import redacted
        from sdtrain.runs.resume import FIXED_ON_RESUME, FREE_ON_RESUME, below, changes

        try:
            config = OmegaConf.to_container(OmegaConf.load(self.folder / "config.yaml"))
        except (OSError, ValueError, YAMLError):
            return {}
        if not isinstance(config, dict):
            return {}
        mine = {
            key: value for key, value in self.cfg.items() if key not in ("resume", "resume_allow")
        }
        fixed = (*FIXED_ON_RESUME, "optimizer", "lr_schedule", "trainer", "callbacks.ema")
        free = [
            *FREE_ON_RESUME,
            "data.sha256",
            "model.autoencoder.sha256",
            *(f"trainer.{name}" for name in ("log_every", "threads", "accelerator", "devices")),
        ]
        free += [
            *self.cfg["resume_allow"],
            *(["model.autoencoder.path"] if self.cfg.get("first_stage") else []),
        ]  # that is the sweep's own
        return {
            key: pair
            for key, pair in changes(config, redacted(mine))[0].items()
            if below(key, fixed) and not below(key, free)
        }

    def said(self) -> str:
        """Why its process has left: the paragraph it left with, or where its words are."""
        if self.code in (130, 143):
            return "interrupted"
        if self.code == -signal.SIGKILL:
            return "killed, perhaps because memory was short"
        with contextlib.suppress(OSError):
            with open(self.folder / OUTPUT, encoding="utf-8", errors="replace") as output:
                output.seek(self.before)
                lines = [
                    line.removeprefix("sdtrain: ").strip()
                    for line in output
                    if line.startswith("sdtrain: ")
                ]
            if lines := [
                line for line in lines if line != self.cfg["name"]
            ]:  # that is the head of its table
                return lines[-1]
        return f"see {self.folder / OUTPUT}"

    def start(self, prefix: str) -> None:
        """Begins it, or goes on with it, in a process that ends with this one. What it says goes to OUTPUT in its folder."""
        from sdtrain.config.overrides import quoted
        from sdtrain.training.first_stage import stop_with_parent

        self.folder.mkdir(parents=True, exist_ok=True)
        environment = {key: value for key, value in os.environ.items() if key not in RANKS} | {
            "WANDB_RUN_GROUP": self.folder.resolve().parent.name
        }
        if self.slot is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.slot
        command = [
            sys.executable,
            "-m",
            "sdtrain.commands.train",
            *self.words,
            "resume=auto",
            f"hydra.run.dir={quoted(str(self.folder))}",
        ]
        print(f"{self.name}: starts{f' on device {self.slot}' if self.slot else ''}", flush=True)
        self.began = time.monotonic()
        with open(self.folder / OUTPUT, "ab") as output:
            self.before = output.tell()
            given = {
                "stdin": subprocess.DEVNULL,
                "stdout": output,
                "stderr": subprocess.STDOUT,
                "env": environment,
            }
            self.process = subprocess.Popen(
                prefixed(prefix, command, environment),
                **given,
                start_new_session=True,
                preexec_fn=stop_with_parent,
            )

    def number(self) -> float | None:
        """What it was measured to be: the last validation/bits_per_dim."""
        with contextlib.suppress(OSError, ValueError):
            lines = [
                json.loads(line)
                for line in (self.folder / "metrics.jsonl").read_text().splitlines()
            ]
            return next(
                (
                    line["validation/bits_per_dim"]
                    for line in reversed(lines)
                    if "validation/bits_per_dim" in line
                ),
                None,
            )
        return None


def names(jobs: Sequence[Sequence[str]], first: int = 0) -> list[str]:
    """What differs between the jobs, as a folder may be called; a number where that says nothing, or too much."""
    pairs = [[word.lstrip("+").partition("=")[::2] for word in job] for job in jobs]
    differ = [place for place in range(len(pairs[0])) if len({job[place] for job in pairs}) > 1]
    for whole in (True, False):  # keys in full, or where that is too long by their last parts
        found = [
            ",".join(
                f"{job[place][0] if whole else job[place][0].rpartition('.')[2]}={job[place][1]}"
                for place in differ
            )
            for job in pairs
        ]
        found = [re.sub(r"[^\w.,=+-]+", "_", re.sub(r"""['"\[\]]""", "", name)) for name in found]
        if max(map(len, found)) <= 80:
            break
    numbered = len(set(found)) < len(found) or max(map(len, found)) > 100 or not found[0]
    return [
        f"{number}_{name[:80]}".rstrip("_") if numbered else name
        for number, name in enumerate(found, first)
    ]


def prefixed(prefix: str, command: list[str], environment: dict[str, str]) -> list[str]:
    """The words that start a command. ssh makes one line of them for a shell, elsewhere, that knows neither this folder nor this environment."""
    before = shlex.split(prefix)
    if not before or Path(before[0]).name != "ssh":
        return [*before, *command]
    known = [
        f"{key}={environment[key]}"
        for key in ("CUDA_VISIBLE_DEVICES", "WANDB_RUN_GROUP", "WANDB_MODE")
        if key in environment
    ]
    return [
        *before,
        f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(['env', *known, *command])}",
    ]
