"""The error boundary around a run: what is said and with which code the command leaves."""

import contextlib
import json
import logging
import os
import re
import sys
import warnings
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from yaml import YAMLError

from sdtrain.console import Unbroken, fail, global_rank, paragraph
from sdtrain.errors import UserError
from sdtrain.paths import config_dir
from sdtrain.redaction import redacted
from sdtrain.runs.checkpoint import published
from sdtrain.runs.lock import only_run
from sdtrain.runs.resume import changes
from sdtrain.training.callbacks.checkpoint import Interrupted
from sdtrain.training.first_stage import FOLDER
from sdtrain.training.run import Run
from sdtrain.training.summary import after, before


def quiet() -> None:
    """Lightning's and torch's advice that does not apply here: loaders without workers, no length, no validation loop."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*barrier\\(\\): using the device.*",
        ".*litlogger.*",
    ):
        warnings.filterwarnings("ignore", message)


def alone() -> None:
    """One process is rank 0 of itself, whatever the scheduler or launcher that has started it calls it: else a second would not see the lock."""
    if "TORCHELASTIC_RUN_ID" in os.environ and (world := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise UserError(
            f"strategy=single is one process, and torchrun has started {world}. Set strategy=ddp trainer.devices={world}, or start one."
        )
    for name in (
        "TORCHELASTIC_RUN_ID",
        "WORLD_SIZE",
        "RANK",
        "LOCAL_RANK",
        "SLURM_NTASKS",
        "SLURM_PROCID",
        "SLURM_LOCALID",
    ):
        os.environ.pop(name, None)
    rank_zero_only.rank = 0


def train(cfg: DictConfig, overrides: list[str], run_dir: Path) -> None:
    """One run, the only one in its folder. Leaves by SystemExit where it does not finish."""
    quiet()
    sys.stdout = Unbroken(sys.stdout)
    # A notebook asks for colours, not for a moving bar; and a path or a list in brackets is no markup.
    console = Console(
        quiet=global_rank() > 0, force_terminal=sys.stdout.isatty(), markup=False, highlight=False
    )
    try:
        if str((cfg.get("strategy") or {}).get("_target_")).endswith(".single"):
            alone()
        with only_run(run_dir, console.print) if global_rank() == 0 else contextlib.nullcontext():
            train_alone(cfg, overrides, run_dir, console)
    except (
        UserError
    ) as error:  # nothing in the folder is ours, neither its status nor its error.log
        fail(error.exit_code, str(error))
    finally:
        with contextlib.suppress(OSError):
            run_dir.rmdir()  # of a run that was refused: it is empty


def train_alone(cfg: DictConfig, overrides: list[str], run_dir: Path, console: Console) -> None:
    run = None
    try:
        run = Run(OmegaConf.to_container(cfg, resolve=True), overrides, run_dir, console)
        for note in run.notes:
            console.print(note)
        run.first_stage()
        run.build()
        before(run)
        run.fit()
        run.status("finished", 0)
        after(run)
    except Interrupted as stop:
        if stop.code:
            run.status("interrupted", stop.code)
            again = f"the same command with resume=auto hydra.run.dir='{run_dir}'"
            console.print(
                f"Interrupted at {run.images_seen} images, the checkpoint is written. Go on with {again}",
                soft_wrap=True,
            )
        sys.exit(stop.code)
    except (UserError, OmegaConfBaseException) as error:
        code = error.exit_code if isinstance(error, UserError) else 2
        if run is not None:
            run.status("diverged" if code == 4 else "failed", code)
        # A loader's worker hands its error on with its traceback before it.
        text = (
            str(error).rpartition(f"{type(error).__name__}: ")[2]
            if "DataLoader worker" in str(error)
            else str(error)
        )
        text = paragraph(error, list) if isinstance(error, OmegaConfBaseException) else text
        # A configuration that is refused leaves nothing, and a folder that holds another run stays as it is.
        fail(
            code,
            " ".join(text.split()),
            run_dir if global_rank() or run is not None and run.owned else None,
        )
    except Exception as error:
        ranks = run.ranks if run is not None else None
        code, text = ranks.verdict(error) if ranks else (1, f"{type(error).__name__}: {error}")
        if re.search("DataLoader worker .*(killed by signal|exited unexpectedly)", str(error)):
            code, text = (
                3,
                (
                    f"A worker of the loader was killed at {run.images_seen} images, perhaps because memory was short. Lower data.num_workers, and go on "
                    f"with resume=auto hydra.run.dir={str(run_dir)!r}."
                ),
            )
        if run is not None:
            run.status("interrupted" if code in (130, 143) else "failed", code)
        fail(
            code,
            " ".join(text.split())[:1000],
            run_dir,
            aloud=global_rank() == 0 or bool(ranks and ranks.orphaned),
        )
    finally:
        if run is not None and run.ranks:
            run.ranks.finish()


def newest_unfinished(overrides: list[str]) -> Path | None:
    """The newest run of the same name, with a checkpoint, that has not finished and that this configuration may go on with."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        wanted = OmegaConf.to_container(compose("train", overrides), resolve=True)
    GlobalHydra.instance().clear()
    try:
        wanted = Run(wanted, overrides, Path(), Console(quiet=True)).cfg
    except UserError:
        return None  # the run itself will say it
    for status in sorted(
        Path("runs", wanted["name"]).glob("*/status.json"),
        key=lambda p: p.stat().st_mtime,
        reverse=True,
    ):
        run = status.parent
        if not published(run) and not published(run / FOLDER):
            continue
        try:
            unfinished, config = (
                json.loads(status.read_text())["state"] != "finished",
                OmegaConf.to_container(OmegaConf.load(run / "config.yaml")),
            )
            _, refused = changes(config, redacted(wanted), wanted["resume_allow"])
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            YAMLError,
            OmegaConfBaseException,
        ):
            continue  # no files of ours
        if unfinished and not refused.keys() - {"model.autoencoder.sha256", "data.sha256"}:
            return run.resolve()
    return None
