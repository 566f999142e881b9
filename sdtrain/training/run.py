"""One training run, from a checked configuration to its last grid."""

import copy
import json
import os
import resource
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

import lightning.pytorch as L
import torch
from omegaconf import OmegaConf
from rich.console import Console

from sdtrain.assemble.model import (
    build,
    build_data,
    build_diffusion,
    build_drawing,
    check_all,
    check_fit,
    cut_captions,
    fitting_objective,
    root,
    seed_weights,
    take_in_table,
    weights_hash,
)
from sdtrain.config.boundary import typed_keys
from sdtrain.config.check import check_call, flat, nearest
from sdtrain.console import global_rank, say
from sdtrain.data.draws import Collate
from sdtrain.data.skipped import Skipped
from sdtrain.diffusion.noise import Gaussian
from sdtrain.errors import StorageError, UserError
from sdtrain.models.autoencoder import check_latent_scale
from sdtrain.redaction import redacted
from sdtrain.runs.checkpoint import newest_whole, published, set_aside, write_text
from sdtrain.runs.resume import applied_changes, refuse_if_different
from sdtrain.training.callbacks.checkpoint import Checkpoints, FolderIO, Signals
from sdtrain.training.callbacks.metrics_log import MetricsLog
from sdtrain.training.callbacks.progress import ProgressBar
from sdtrain.training.datamodule import DataModule, micro_batch
from sdtrain.training.first_stage import FOLDER, first_stage_done, train_first_stage
from sdtrain.training.loggers.wandb import close
from sdtrain.training.optimisation import Optimisation
from sdtrain.training.ranks import Ranks
from sdtrain.training.trainer import TrainerSettings, make_trainer

DIFFUSION_ONLY = (
    "schedule",
    "prediction",
    "weighting",
    "loss",
    "times",
    "noise",
    "sampler",
    "grid",
    "guidance",
)


def report(line: str) -> None:
    """Something that a run gets over, on rank 0's stderr."""
    if global_rank() == 0:
        print(f"sdtrain: {line}", file=sys.stderr, flush=True)


def peak_memory_mb() -> int:
    """Of the device's allocations where there is one, else of this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return round(torch.cuda.max_memory_allocated() / 2**20)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)


class Run:
    """Everything of one run, built and checked before the first step."""

    def __init__(
        self,
        cfg: dict,
        overrides: list[str],
        run_dir: Path,
        console: Console,
        *,
        listens: bool = True,
    ) -> None:
        self.cfg, self.overrides, self.run_dir, self.console = cfg, overrides, run_dir, console
        self.typed = typed_keys(overrides)
        self.owned = not published(
            run_dir
        )  # another run's status is not ours to write, until we go on with it
        self.ranks: Ranks | None = None
        self.signals = Signals()
        self.notes = self.check()
        if listens:
            self.signals.install()

    def check(self) -> list[str]:
        check_call(self.cfg, "", root, set(), self.typed)
        check_call(
            self.cfg["checkpoint"],
            "checkpoint",
            Checkpoints,
            {"run_dir", "signals", "max_minutes"},
            self.typed,
        )
        keys = {key for key, _ in flat(self.cfg)} | {"model.autoencoder.sha256", "data.sha256"}
        if unknown := [key for key in self.cfg["resume_allow"] if key not in keys]:
            raise UserError(
                f"resume_allow={unknown[0]}: there is no such key to change.{nearest(unknown[0], keys)} Name keys or groups in resume_allow."
            )
        self.is_diffusion = not self.cfg["model"]["_target_"].endswith("AutoencoderModule")
        if self.is_diffusion and (
            missing := [key for key in DIFFUSION_ONLY if not self.cfg.get(key)]
        ):
            raise UserError(f"{missing[0]} is missing. Choose one with {missing[0]}=NAME.")
        if not self.is_diffusion and (
            useless := [key for key in (*DIFFUSION_ONLY, "first_stage") if self.cfg.get(key)]
        ):
            raise UserError(
                f"{useless[0]} has no effect when an autoencoder is trained. Remove {useless[0]}, or choose model=latent_diffusion."
            )
        stranger = "Reconstructions" if self.is_diffusion else "SampleGrid"
        if odd := [
            name
            for name, node in (self.cfg.get("callbacks") or {}).items()
            if node and node["_target_"].endswith(f".{stranger}")
        ]:
            fitting = "default" if self.is_diffusion else "autoencoder"
            raise UserError(
                f"callbacks.{odd[0]} cannot look at this model. Choose callbacks={fitting}, or remove it with ~callbacks.{odd[0]}."
            )
        if self.cfg.get("first_stage"):
            if self.typed & {"model.autoencoder.path", "model/autoencoder"}:
                self.cfg["first_stage"] = None  # the user brings an autoencoder
            else:
                self.cfg["model"]["autoencoder"]["path"] = "first_stage/autoencoder"
        notes = check_all(self.cfg, self.typed)
        if self.is_diffusion:  # before anything is trained or loaded
            take_in_table(self.cfg["schedule"])
            schedule = fitting_objective(self.cfg, self.typed, notes).schedule
            self.drawing = build_drawing(self.cfg, schedule)
            for steps in ((self.cfg.get("callbacks") or {}).get("samples") or {}).get(
                "sampler_steps", ()
            ):
                try:
                    build_drawing(self.cfg | {"steps": steps}, schedule)
                except UserError as error:
                    raise UserError(f"callbacks.samples.sampler_steps: {error}") from error
        self.check_training()
        return notes

    def check_training(self) -> None:
        """Makes what needs neither data nor weights, for what it refuses."""
        cfg = self.cfg
        self.settings: TrainerSettings = build(cfg["trainer"], "trainer")
        if self.settings.precision == "16-mixed" and cfg["optimizer"].get("fused"):
            # Lightning leaves unscaling to fused optimizers, after the clipping: gradients would be clipped while they are still scaled.
            raise UserError(
                "trainer.precision=16-mixed needs optimizer.fused=false. Set it, or choose bf16-mixed."
            )
        micro_batch(cfg["data"]["batch_size"], self.settings.devices, self.settings.accumulate)
        self.optimisation = Optimisation(
            optimizer=build(cfg["optimizer"], "optimizer"),
            lr_schedule=build(cfg["lr_schedule"], "lr_schedule"),
            max_images=self.settings.max_images,
            gradient_clip=self.settings.gradient_clip,
            max_skipped=self.settings.max_skipped,
        )
        self.try_optimizer([torch.nn.Parameter(torch.zeros(2, 2))])
        if build(cfg["strategy"], "strategy") == "auto" and self.settings.devices > 1:
            raise UserError(
                f"trainer.devices={self.settings.devices} needs strategy=ddp; strategy=single is one process on one device."
            )
        self.data = None
        self.callbacks(
            [
                name
                for name, node in (cfg.get("callbacks") or {}).items()
                if node and node["_target_"].startswith("sdtrain.")
            ]
        )

    def try_optimizer(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        try:
            self.optimisation.configure(parameters)
        except (ValueError, TypeError, RuntimeError) as error:
            named = [
                key
                for key, value in self.cfg["optimizer"].items()
                if str(value) in str(error).split()[-1:]
            ]
            raise UserError(
                f"optimizer: {error}. Change {f'optimizer.{named[0]}' if named else 'optimizer'}."
            ) from error

    def first_stage(self) -> None:
        """Trains the autoencoder first, unless it lies there already. From then on the folder is known for this run's."""
        if not self.cfg.get("first_stage") or first_stage_done(self.run_dir):
            return
        if self.cfg["resume"] == "must" and not published(self.run_dir / FOLDER):
            raise self.nothing_to_resume()
        self.console.print(
            f"First stage: sdtrain experiment={self.cfg['first_stage']['experiment']}"
        )
        self.write_config(self.saved_config())
        self.status("running")
        if code := train_first_stage(self.cfg, self.overrides, self.run_dir, self.signals):
            self.status("failed", code)
            raise SystemExit(code)

    def build(self) -> None:
        cfg = self.cfg
        self.settings.check_devices()
        if self.settings.threads:
            torch.set_num_threads(self.settings.threads)
        self.data = build_data(cfg["data"])
        for note in getattr(self.data, "notes", ()):
            self.console.print(note)
        if self.is_diffusion:
            self.module = build_diffusion(cfg, self.run_dir, self.optimisation)
            shape, posterior = (
                self.module.autoencoder.latent_shape(self.data.image_size),
                self.module.autoencoder.sample_posterior,
            )
            stratified, noise = self.module.objective.times.stratified, build(cfg["noise"], "noise")
        else:
            seed_weights(cfg["seed"], "autoencoder")
            self.module = build(cfg["model"], "model", optimisation=self.optimisation)
            shape, posterior, stratified, noise = (
                self.module.latent_shape(self.data.image_size),
                True,
                False,
                Gaussian(),
            )
        collate = Collate(
            seed=cfg["seed"],
            latent_shape=shape,
            posterior=posterior,
            stratified=stratified,
            global_batch=cfg["data"]["batch_size"],
            noise=noise,
        )
        limit = getattr(self.data, "max_skipped", None)
        self.datamodule = DataModule(
            data=self.data,
            batch_size=cfg["data"]["batch_size"],
            num_workers=cfg["data"]["num_workers"],
            seed=cfg["seed"],
            collate=collate,
            accumulate=self.settings.accumulate,
            skipped=None if limit is None else Skipped(limit=limit, report=report),
        )
        if self.is_diffusion:
            check_fit(self.module, self.data)
            if note := cut_captions(self.module, self.data):
                self.console.print(note)
            calibration = [
                self.datamodule.train[(i, i)].image
                for i in range(min(64, len(self.datamodule.train)))
            ]
            check_latent_scale(self.module.autoencoder, torch.stack(calibration))
        self.try_optimizer(
            [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        )

    def saved_config(self) -> str:
        """The resolved configuration without secrets, with the hashes of the frozen weights and of the data's listing."""
        cfg = copy.deepcopy(self.cfg)
        del cfg["resume"], cfg["resume_allow"]
        if self.is_diffusion and hasattr(self, "module") and (digest := weights_hash(self.module)):
            cfg["model"]["autoencoder"]["sha256"] = digest
        if digest := getattr(
            getattr(self, "data", None), "sha256", None
        ):  # of data that lie in files
            cfg["data"]["sha256"] = digest
        return OmegaConf.to_yaml(OmegaConf.create(redacted(cfg)))

    def write_config(self, config: str) -> None:
        if global_rank() == 0:
            try:
                write_text(self.run_dir / "config.yaml", config)
            except OSError as error:
                raise StorageError(
                    f"{self.run_dir} cannot be written: {error.strerror}. Set hydra.run.dir to another folder."
                ) from error

    def resume_from(self, config: str) -> Path | None:
        """The checkpoint to go on from. Raises UserError where that would mix two runs."""
        asked, found = self.cfg["resume"], published(self.run_dir)
        if asked == "never":
            if found:
                raise UserError(
                    f"{self.run_dir} already holds a run. Set resume=auto to go on with it, or another hydra.run.dir."
                )
            return None
        newest, passed_over = newest_whole(self.run_dir)
        for line in passed_over:
            self.console.print(line, soft_wrap=True)
        if newest is None:
            if asked == "must" or found:  # to start anew would write over what there is
                raise self.nothing_to_resume()
            self.console.print("resume=auto: there is nothing to resume, the run starts anew.")
        else:
            self.go_on(newest, config)
        self.owned = True
        if global_rank() == 0:
            set_aside(
                [
                    folder
                    for folder in found
                    if newest is None or int(folder.name) > int(newest.name)
                ]
            )
        return newest

    def nothing_to_resume(self) -> UserError:
        found, asked = len(published(self.run_dir)), self.cfg["resume"]
        if found:
            return StorageError(
                f"resume={asked}, but none of the {found} checkpoints in {self.run_dir} is whole. Restore one, or set another hydra.run.dir."
            )
        return UserError(
            f"resume={asked}, but there is no whole checkpoint in {self.run_dir}. Set hydra.run.dir to the run, or resume=auto to start anew."
        )

    def go_on(self, newest: Path, config: str) -> None:
        """Says what has changed since, or refuses it."""
        for line in applied_changes(
            newest,
            OmegaConf.to_container(OmegaConf.create(config)),
            self.module,
            self.cfg["resume_allow"],
        ):
            self.console.print(line, soft_wrap=True)
        self.console.print(f"Going on from {newest}", soft_wrap=True)
        if int(newest.name) >= self.settings.max_images:
            self.console.print(
                f"There is nothing left to train: trainer.max_images={self.settings.max_images}, and {int(newest.name)} were seen."
            )

    def callbacks(self, names: list[str] | None = None) -> list[L.Callback]:
        """names: of those under `callbacks`; None is all."""
        cfg, run_dir = self.cfg, self.run_dir
        self.metrics_log = MetricsLog(every=self.settings.log_every, run_dir=run_dir)
        given = {
            "run_dir": run_dir,
            "metrics_log": self.metrics_log,
            "data": self.data,
            "ema": None,
        }
        if self.is_diffusion:
            given["drawing"] = self.drawing
        nodes = {
            name: node
            for name, node in (cfg.get("callbacks") or {}).items()
            if node and (names is None or name in names)
        }
        self.by_name = {}
        for name in sorted(nodes, key=lambda n: n != "ema"):  # the average first: the others use it
            self.by_name[name] = build(nodes[name], f"callbacks.{name}", **given)
            if name == "ema":
                given["ema"] = self.by_name[name]
        self.ema = given["ema"]
        self.validation = (
            build(cfg["validation"], "validation", **given) if cfg.get("validation") else None
        )
        progress = ProgressBar(metrics_log=self.metrics_log, console=self.console)
        checkpoints = Checkpoints(
            **cfg["checkpoint"],
            run_dir=run_dir,
            signals=self.signals,
            max_minutes=self.settings.max_minutes,
        )
        ordered = [
            self.ema,
            self.metrics_log,
            progress,
            *(c for c in self.by_name.values() if c is not self.ema),
            self.validation,
            checkpoints,
        ]
        return [callback for callback in ordered if callback is not None]

    def fit(self) -> None:
        config = self.saved_config()
        checkpoint = self.resume_from(config)
        callbacks = self.callbacks()
        self.write_config(config)
        name = redacted(f"{self.cfg['name']}/{self.run_dir.name}")
        given = {
            "run_dir": self.run_dir,
            "name": name,
            "resumed": int(checkpoint.name) if checkpoint else 0,
        }
        logger = build(self.cfg["logger"], "logger", **given) if self.cfg.get("logger") else None
        if logger is not None:
            logger.log_hyperparams(OmegaConf.to_container(OmegaConf.create(config)))
        strategy = build(self.cfg["strategy"], "strategy")
        if strategy != "auto":
            self.ranks = Ranks(
                rank=global_rank(),
                timeout=self.cfg["strategy"]["timeout"],
                run_dir=self.run_dir,
                config=config,
                compare=refuse_if_different,
                leave=self.leave,
            )
            callbacks.insert(0, self.ranks)
        kept = {key: self.cfg["checkpoint"][key] for key in ("keep", "max_failed_saves")}
        io = FolderIO(config=config, **kept, report=report)
        self.trainer = make_trainer(
            self.settings,
            strategy,
            self.datamodule.batch_size,
            [logger] if logger else [],
            callbacks,
            self.run_dir,
            io,
        )
        self.status("running")
        try:
            self.trainer.fit(self.module, datamodule=self.datamodule, ckpt_path=checkpoint)
        finally:
            io.settle()
            for each in self.trainer.loggers:
                close(each, failed=sys.exc_info()[0] is not None)

    @property
    def images_seen(self) -> int:
        return self.datamodule.images_seen if hasattr(self, "datamodule") else 0

    def status(self, state: str, exit_code: int | None = None) -> None:
        if (
            (global_rank() == 0 or self.ranks and self.ranks.orphaned)
            and self.owned
            and self.run_dir.is_dir()
        ):
            record = {
                "state": state,
                "pid": os.getpid(),
                "images_seen": self.images_seen,
                "exit_code": exit_code,
                "peak_memory_mb": peak_memory_mb(),
            }
            record["command"] = shlex.join(redacted(["sdtrain", *sys.argv[1:]]))
            try:
                write_text(
                    self.run_dir / "status.json",
                    json.dumps(record, indent=1, ensure_ascii=False) + "\n",
                )
            except OSError as error:
                if state in (
                    "running",
                    "finished",
                ):  # what else ends the run is said, and not hidden by this
                    raise StorageError(
                        f"{self.run_dir}/status.json cannot be written: {error.strerror}. Free space and resume with resume=auto."
                    ) from error

    def leave(self, code: int, paragraph: str) -> None:
        """Ends the process from a thread, while the main one is stuck."""
        self.status("interrupted" if code in (130, 143) else "failed", code)
        say(" ".join(paragraph.split()), self.run_dir, aloud=True)
        os._exit(code)
