"""The arms of a sweep: what they are called, how each is started, and whether it has been done."""

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

RANKS = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")


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
    code: int | None = None

    def finished(self) -> bool:
        """Whether it has been done before, with this configuration."""
        from sdtrain.cli.resume import changes
        from sdtrain.redaction import redacted

        try:
            state = json.loads((self.folder / "status.json").read_text())["state"]
            config = OmegaConf.to_container(OmegaConf.load(self.folder / "config.yaml"))
        except (OSError, ValueError, KeyError):
            return False
        mine = {key: value for key, value in self.cfg.items() if key not in ("resume", "resume_allow")}
        changed = changes(config, redacted(mine))[0].keys() - {"model.autoencoder.sha256", "data.sha256", "model.autoencoder.path"}
        return state == "finished" and not {key for key in changed if not key.startswith("first_stage")}

    def start(self, prefix: str) -> None:
        """Begins it, or goes on with it, in a process that ends with this one. What it says goes to output.txt in its folder."""
        from sdtrain.cli.arguments import quoted
        from sdtrain.cli.first_stage import stop_with_parent

        self.folder.mkdir(parents=True, exist_ok=True)
        environment = {key: value for key, value in os.environ.items() if key not in RANKS} | {"WANDB_RUN_GROUP": self.folder.parent.name}
        if self.slot is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.slot
        command = [sys.executable, "-m", "sdtrain.cli.train", *self.words, "resume=auto", f"hydra.run.dir={quoted(str(self.folder))}"]
        print(f"{self.name}: starts{f' on device {self.slot}' if self.slot else ''}", flush=True)
        self.began = time.monotonic()
        with open(self.folder / "output.txt", "ab") as output:
            given = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT, "env": environment}
            self.process = subprocess.Popen(prefixed(prefix, command, environment), **given, start_new_session=True, preexec_fn=stop_with_parent)

    def number(self) -> float | None:
        """What it was measured to be: the last validation/bits_per_dim."""
        with contextlib.suppress(OSError, ValueError):
            lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
            return next((line["validation/bits_per_dim"] for line in reversed(lines) if "validation/bits_per_dim" in line), None)
        return None


def names(jobs: Sequence[Sequence[str]], first: int = 0) -> list[str]:
    """What differs between the jobs, as a folder may be called; a number where that says nothing, or too much."""
    pairs = [[word.lstrip("+").partition("=")[::2] for word in job] for job in jobs]
    differ = [place for place in range(len(pairs[0])) if len({job[place] for job in pairs}) > 1]
    found = [",".join(f"{job[place][0]}={job[place][1]}" for place in differ) for job in pairs]
    found = [re.sub(r"[^\w.,=+-]+", "_", re.sub(r"""['"\[\]]""", "", name)) for name in found]
    numbered = len(set(found)) < len(found) or max(map(len, found)) > 100 or not found[0]
    return [f"{number}_{name[:80]}".rstrip("_") if numbered else name for number, name in enumerate(found, first)]


def prefixed(prefix: str, command: list[str], environment: dict[str, str]) -> list[str]:
    """The words that start a command. ssh makes one line of them for a shell, elsewhere, that knows neither this folder nor this environment."""
    before = shlex.split(prefix)
    if not before or Path(before[0]).name != "ssh":
        return [*before, *command]
    known = [f"{key}={environment[key]}" for key in ("CUDA_VISIBLE_DEVICES", "WANDB_RUN_GROUP", "WANDB_MODE") if key in environment]
    return [*before, f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(['env', *known, *command])}"]
