"""The error boundary around a run: what is said and with which code the command leaves."""

import contextlib
import json
import logging
import sys
import warnings
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from sdtrain.callbacks.checkpoint import Interrupted
from sdtrain.checkpoints import published
from sdtrain.cli.errors import fail, global_rank, paragraph
from sdtrain.cli.lock import only_run
from sdtrain.cli.resume import changes
from sdtrain.cli.run import Run
from sdtrain.cli.summary import after, before
from sdtrain.errors import UserError
from sdtrain.paths import config_dir
from sdtrain.redaction import redacted


def quiet() -> None:
    """Lightning's and torch's advice that does not apply here: loaders without workers, no length, no validation loop."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for message in (".*does not have many workers.*", ".*isinstance\\(treespec, LeafSpec\\).*", ".*barrier\\(\\): using the device.*", ".*litlogger.*"):
        warnings.filterwarnings("ignore", message)


def train(cfg: DictConfig, overrides: list[str], run_dir: Path) -> None:
    """One run, the only one in its folder. Leaves by SystemExit where it does not finish."""
    quiet()
    # A notebook asks for colours, not for a moving bar; and a path or a list in brackets is no markup.
    console = Console(quiet=global_rank() > 0, force_terminal=sys.stdout.isatty(), markup=False, highlight=False)
    try:
        with only_run(run_dir, console.print) if global_rank() == 0 else contextlib.nullcontext():
            train_alone(cfg, overrides, run_dir, console)
    except UserError as error:  # nothing in the folder is ours, neither its status nor its error.log
        fail(error.exit_code, str(error))


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
            console.print(f"Interrupted at {run.images_seen} images, the checkpoint is written. Go on with {again}", soft_wrap=True)
        sys.exit(stop.code)
    except (UserError, OmegaConfBaseException) as error:
        code = error.exit_code if isinstance(error, UserError) else 2
        if run is not None:
            run.status("diverged" if code == 4 else "failed", code)
        # A loader's worker hands its error on with its traceback before it.
        text = str(error).rpartition(f"{type(error).__name__}: ")[2] if "DataLoader worker" in str(error) else str(error)
        text = paragraph(error, list) if isinstance(error, OmegaConfBaseException) else text
        fail(code, " ".join(text.split()), run_dir)
    except Exception as error:
        ranks = run.ranks if run is not None else None
        code, text = ranks.verdict(error) if ranks else (1, f"{type(error).__name__}: {error}")
        if run is not None:
            run.status("failed", code)
        fail(code, " ".join(text.split())[:1000], run_dir, aloud=global_rank() == 0 or bool(ranks and ranks.orphaned))
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
    for status in sorted(Path("runs", wanted["name"]).glob("*/status.json"), key=lambda p: p.stat().st_mtime, reverse=True):
        run = status.parent
        if published(run) and (run / "config.yaml").is_file() and json.loads(status.read_text())["state"] != "finished":
            _, refused = changes(OmegaConf.to_container(OmegaConf.load(run / "config.yaml")), redacted(wanted), wanted["resume_allow"])
            if not refused.keys() - {"model.autoencoder.sha256", "data.sha256"}:
                return run.resolve()
    return None
