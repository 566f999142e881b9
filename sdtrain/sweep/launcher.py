"""Sweeps: Hydra's multirun with each arm in a fresh process, side by side where there are devices for it.

Hydra asks for its launchers in a package hydra_plugins; `register` makes that name for ours.
"""

import atexit
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf

from sdtrain.sweep.arms import Arm, names

RECORD = "sweep.json"
NOT_AN_ARMS = re.compile(r"[+~]*(hydra[./]|sweep(=|$)|resume=)")


class ProcessLauncher(Launcher):
    """Runs each arm by `python -m sdtrain.commands.train`, and goes on with those that were stopped; what is finished is left as it is.

    Args:
        parallel: arms at once; null: as many as there are devices for, one where there are none, all with a prefix.
        devices: a value of CUDA_VISIBLE_DEVICES for each place, as ["0,1", "2,3"]; null shares out what the machine has.
        prefix: words before the command of each arm, as "srun --gpus=1" or "ssh -tt host": a cluster's own scheduler places it, on the same files.
    """

    def __init__(
        self, *, parallel: int | None = None, devices: list[str] | None = None, prefix: str = ""
    ) -> None:
        self.parallel, self.devices, self.prefix = (
            parallel,
            OmegaConf.to_container(devices) if OmegaConf.is_config(devices) else devices,
            prefix,
        )
        from sdtrain.training.callbacks.checkpoint import Signals

        self.signals = Signals()

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config
        self.folder = Path(config.hydra.sweep.dir).absolute()
        atexit.register(nothing_left_behind, self.folder)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from sdtrain.console import Unbroken
        from sdtrain.errors import UserError
        from sdtrain.runs.lock import only_run

        sys.stdout = Unbroken(sys.stdout)
        self._check_places()
        if not job_overrides:
            raise UserError(
                "The sweep has no arm: one of its keys is given no value. Write key=value,value."
            )
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):
            (folder / "multirun.yaml").unlink()  # Hydra's own, see nothing_left_behind
        jobs = [[word for word in job if not NOT_AN_ARMS.match(word)] for job in job_overrides]
        arms = [
            self._arm(name, folder, job)
            for name, job in zip(names(jobs, initial_job_idx), jobs, strict=True)
        ]
        with only_run(folder, print, "hydra.sweep.dir"):
            with self._recorded(folder, arms):
                self._check(arms)
            handlers = {
                number: signal.getsignal(number)
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
            }
            self.signals.install()  # arms save and leave, and no more are started
            try:
                self._share_first_stage(folder, arms)
                self._run(arms)
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
        self._leave_unless_done(folder, arms)
        return [self._returned(arm, number) for number, arm in enumerate(arms, initial_job_idx)]

    def _check_places(self) -> None:
        """The launcher's own arguments: Hydra does not look at them."""
        from sdtrain.config.check import check_value
        from sdtrain.errors import UserError

        check_value(self.parallel, int | None, "hydra.launcher.parallel")
        check_value(self.devices, list[str | int] | None, "hydra.launcher.devices")
        check_value(self.prefix, str, "hydra.launcher.prefix")
        if self.parallel is not None and self.parallel < 1:
            raise UserError(
                f"hydra.launcher.parallel={self.parallel} lets no arm run. Give 1 or more."
            )
        try:
            words = shlex.split(self.prefix)
        except ValueError as error:
            raise UserError(
                f"hydra.launcher.prefix={self.prefix} cannot be read: {error}. Change hydra.launcher.prefix."
            ) from error
        if words and shutil.which(words[0]) is None:
            raise UserError(
                f"hydra.launcher.prefix={self.prefix}: there is no command '{words[0]}' here. Change hydra.launcher.prefix."
            )

    @contextlib.contextmanager
    def _recorded(self, folder: Path, arms: list[Arm]) -> Iterator[None]:
        """Writes the words of the sweep and the names of its arms, after those of an earlier one in the same folder; takes it back where the
        sweep is refused. At once, so that the same command a moment later finds this one."""
        from sdtrain.errors import UserError
        from sdtrain.redaction import redacted
        from sdtrain.runs.checkpoint import write_text

        path = folder / RECORD
        earlier = path.read_bytes() if path.exists() else None
        try:
            known = [] if earlier is None else list(map(str, json.loads(earlier)["arms"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is no record of a sweep. Remove it, or choose another hydra.sweep.dir."
            ) from error
        record = {
            "command": redacted(sys.argv[1:]),
            "arms": list(dict.fromkeys([*known, *(arm.name for arm in arms)])),
        }
        write_text(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        try:
            yield
        except BaseException:
            path.unlink()
            if earlier is not None:
                path.write_bytes(earlier)
            raise

    def _arm(self, name: str, folder: Path, words: list[str]) -> Arm:
        cfg = self.context.config_loader.load_sweep_config(self.config, list(words))
        cfg = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
        return Arm(name, folder / name, words, OmegaConf.to_container(cfg, resolve=True))

    def _check(self, arms: list[Arm]) -> None:
        """What one arm would be refused for ends the sweep before any arm has begun."""
        import copy

        from rich.console import Console

        from sdtrain.errors import UserError
        from sdtrain.training.run import Run

        if (self.folder / "config.yaml").exists():
            raise UserError(
                f"{self.folder} is the folder of a run. Choose another hydra.sweep.dir."
            )
        chosen = self.config.hydra.runtime.choices.get("sweep")
        if len(arms) == 1 and (
            swept := [
                key
                for key, values in (self.config.hydra.sweeper.params or {}).items()
                if "," in values
            ]
        ):
            typed = next(
                word for word in arms[0].words if word.lstrip("+").partition("=")[0] in swept
            )
            raise UserError(
                f"sweep={chosen} varies {', '.join(swept)}, and {typed} leaves a single arm. Remove {typed}, or sweep={chosen}."
            )
        for arm in arms:
            try:
                arm.cfg = Run(
                    copy.deepcopy(arm.cfg),
                    arm.words,
                    arm.folder,
                    Console(quiet=True),
                    listens=False,
                ).cfg  # with what makes way
            except UserError as error:
                raise UserError(f"In the arm {arm.name}: {error}") from error
            if begun := arm.begun_otherwise():
                changed = ", ".join(f"{key}: {old} -> {new}" for key, (old, new) in begun.items())
                raise UserError(
                    f"{arm.folder} holds a run with another configuration ({changed}). Set it back, or choose another hydra.sweep.dir."
                )
        for place, arm in enumerate(arms):
            if same := next((other for other in arms[:place] if other.cfg == arm.cfg), None):
                raise UserError(
                    f"The arms {same.name} and {arm.name} have the same configuration, and would give the same weights. Leave one out."
                )

    def _share_first_stage(self, folder: Path, arms: list[Arm]) -> None:
        """One autoencoder for all arms that would train the same one: else their latents could not be compared."""
        from sdtrain.config.overrides import quoted
        from sdtrain.training.first_stage import FOLDER, first_stage_done, train_first_stage

        recipes = [(arm.cfg.get("first_stage"), arm.cfg["data"]) for arm in arms]
        if (
            not recipes[0][0]
            or any(recipe != recipes[0] for recipe in recipes)
            or any("model.autoencoder.path=" in word for word in arms[0].words)
        ):
            return
        if not first_stage_done(folder):
            print(
                f"First stage of all arms: sdtrain experiment={recipes[0][0]['experiment']}",
                flush=True,
            )
            if code := train_first_stage(arms[0].cfg, arms[0].words, folder, self.signals):
                raise SystemExit(code)
        for arm in arms:
            arm.words.append(
                f"model.autoencoder.path={quoted(str((folder / FOLDER / 'autoencoder').resolve()))}"
            )

    def _slots(self, arms: list[Arm]) -> list[str | None]:
        """A value of CUDA_VISIBLE_DEVICES for each arm that may run at once, None where it is left as it is."""
        if self.devices:
            return list(map(str, self.devices))[: self.parallel]
        if self.prefix:
            return [None] * (self.parallel or len(arms))
        import torch

        each = max(arm.cfg["trainer"]["devices"] for arm in arms)
        on_cpu = any(arm.cfg["trainer"]["accelerator"] == "cpu" for arm in arms)
        count = 0 if on_cpu else torch.cuda.device_count() // each
        known = os.environ.get(
            "CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count * each)))
        ).split(",")
        slots = [",".join(known[place * each : (place + 1) * each]) for place in range(count)]
        return slots[: self.parallel] or [None] * (self.parallel or 1)

    def _run(self, arms: list[Arm]) -> None:
        from sdtrain.errors import StorageError

        waiting, free, running = [], self._slots(arms), []
        for arm in arms:
            if arm.finished():
                arm.code = 0
                print(f"{arm.name}: done before", flush=True)
            else:
                waiting.append(arm)
        while running or waiting and not self.signals.received:
            while waiting and free and not self.signals.received:
                arm = waiting.pop(0)
                arm.slot = free.pop(0)
                try:
                    arm.start(self.prefix)
                    running.append(arm)
                except OSError as error:  # others go on
                    arm.code = StorageError.exit_code
                    free.append(arm.slot)
                    print(
                        f"{arm.name}: cannot start: {error.strerror}: {error.filename}", flush=True
                    )
            for arm in [arm for arm in running if arm.process.poll() is not None]:
                running.remove(arm)
                free.append(arm.slot)
                arm.code = arm.process.returncode
                seconds = f"{time.monotonic() - arm.began:.0f} s"
                if arm.code == 0 and not arm.finished():  # a prefix has spoken for itself
                    arm.code = 1
                    print(
                        f"{arm.name}: not finished after {seconds}, though its command has ended. Give a hydra.launcher.prefix that waits.",
                        flush=True,
                    )
                elif arm.code:
                    print(
                        f"{arm.name}: left with {arm.code} after {seconds}: {arm.said()}",
                        flush=True,
                    )
                else:
                    number = (
                        "" if arm.number() is None else f", {arm.number():.4f} bits per dimension"
                    )
                    print(f"{arm.name}: finished, {seconds}{number}", flush=True)
            if self.signals.received and not getattr(self, "forwarded", False):
                self.forwarded = True
                for arm in running:
                    arm.process.send_signal(self.signals.received)
            time.sleep(0.05)

    def _leave_unless_done(self, folder: Path, arms: list[Arm]) -> None:
        failed, done = (
            [arm for arm in arms if arm.code not in (0, None)],
            sum(arm.code == 0 for arm in arms),
        )
        print(
            f"{done} of {len(arms)} arms are finished. Compare them with: sdtrain-report {shlex.quote(str(folder))}",
            flush=True,
        )
        if self.signals.received:
            print("Interrupted: the same command goes on.", flush=True)
            raise SystemExit(130 if self.signals.received == signal.SIGINT else 143)
        if failed:
            print(
                f"Not finished: {', '.join(f'{arm.name} ({arm.code})' for arm in failed)}. The same command tries them again.",
                file=sys.stderr,
                flush=True,
            )
            raise SystemExit(
                next(abs(arm.code) if arm.code > 0 else 128 - arm.code for arm in failed)
            )

    def _returned(self, arm: Arm, number: int) -> JobReturn:
        """For sweepers that look for the best."""
        done = JobReturn(overrides=arm.words, working_dir=str(arm.folder))
        done.cfg, done.status, done.return_value = (
            OmegaConf.create(arm.cfg),
            JobStatus.COMPLETED,
            arm.number(),
        )
        return done


def check_words(words: Sequence[str]) -> None:
    """What Hydra would take in silence, and leave undone."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from sdtrain.errors import UserError

    flags = {word.partition("=")[0] for word in words}
    if flags & {"-m", "--multirun"} and flags & {"--cfg", "-c", "--info", "-i"}:
        raise UserError(
            "--cfg and --info show one run and not several. Remove them, or -m and the values after the first."
        )
    parsed = OverridesParser.create().parse_overrides(
        [word for word in words if not word.startswith("-") and "=" in word]
    )
    keys, several = (
        [each.key_or_group for each in parsed],
        {each.key_or_group for each in parsed if each.is_sweep_override()},
    )
    if searched := next((each.key_or_group for each in parsed if each.is_interval_sweep()), None):
        raise UserError(
            f"{searched}=interval(...) names no values. Write them out, {searched}=value,value."
        )
    if twice := next((key for key in keys if key in several and keys.count(key) > 1), None):
        raise UserError(
            f"{twice} is given twice, and several values of it would be lost. Remove one of the two."
        )
    if alone := next((key for key in keys if key in ("hydra.run.dir", "hydra.sweep.subdir")), None):
        raise UserError(
            f"{alone} is not a sweep's: its folder is hydra.sweep.dir, and arms are named by what differs. Set hydra.sweep.dir."
        )
    if "sweep" in several:
        raise UserError("sweep=NAME,NAME names several sweeps. Start one after the other.")


def earlier_sweep(words: Sequence[str]) -> Path | None:
    """The folder of the newest sweep that the same words have begun, here under runs/."""
    from sdtrain.redaction import redacted

    mine = same_sweep(redacted(list(words)))
    for record in sorted(sweeps_here(), key=lambda path: path.stat().st_mtime, reverse=True):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if same_sweep(json.loads(record.read_text())["command"]) == mine:
                return record.parent.resolve()
    return None


def sweeps_here() -> list[Path]:
    """The records of the sweeps under runs/."""
    found = []
    for folder, inside, files in os.walk("runs"):
        if RECORD in files:
            found.append(Path(folder, RECORD))
        if {RECORD, "config.yaml"} & set(files):
            inside.clear()  # a sweep's arms, and what a run holds
    return found


def same_sweep(words: Sequence[str]) -> list[str]:
    """The words that make a sweep what it is: where it lies and how its arms are started is another matter."""
    return sorted(
        word for word in words if not re.match(r"[+~]*hydra[./](launcher|sweep[.]dir)", word)
    )


def nothing_left_behind(folder: Path) -> None:
    """Removes Hydra's own record, which holds what an arm's config.yaml hides, and the folder of a sweep that was refused: it is empty."""
    with contextlib.suppress(OSError):
        (folder / "multirun.yaml").unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def register() -> None:
    """Makes hydra/launcher=process known to Hydra."""
    Plugins.instance()  # first: it scans the real hydra_plugins, if there are any
    home = types.ModuleType("hydra_plugins.sdtrain")
    home.ProcessLauncher, ProcessLauncher.__module__ = ProcessLauncher, home.__name__
    parent = sys.modules.setdefault("hydra_plugins", types.ModuleType("hydra_plugins"))
    parent.sdtrain = sys.modules[home.__name__] = home
    Plugins.instance().register(ProcessLauncher)
    node = {
        "_target_": "hydra_plugins.sdtrain.ProcessLauncher",
        "parallel": None,
        "devices": None,
        "prefix": "",
    }
    ConfigStore.instance().store(group="hydra/launcher", name="process", node=node)
