"""The names of all files in the folder of a run. No other module spells them out."""

import re
from dataclasses import dataclass
from pathlib import Path

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
AUTOENCODER = "autoencoder"
FIRST_STAGE = "first_stage"
FIRST_STAGE_AUTOENCODER = f"{FIRST_STAGE}/{AUTOENCODER}"
"""The autoencoder that a first stage saves, as a path below the run that it was trained for."""
DAMAGED = ".damaged"
"""Suffix in the name of a checkpoint that was found damaged."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run, finished or not."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config(self) -> Path:
        """The resolved configuration as yaml."""
        return self.path / CONFIG

    @property
    def data_record(self) -> Path:
        """What sampling needs to know about the data: see runs/data_record.py."""
        return self.path / "data.json"

    @property
    def status(self) -> Path:
        """State, process id, images seen and exit code: see runs/status.py."""
        return self.path / "status.json"

    @property
    def metrics(self) -> Path:
        """The logged numbers, one line of JSON for each time that they are logged."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Grids, strips and single pictures drawn during training."""
        return self.path / "samples"

    def sample(self, kind: str, images_seen: int | str) -> Path:
        """A picture drawn during training.

        Args:
            kind: "grid", "strip", ...
            images_seen: when it was drawn; "*" gives a glob pattern for all of them.
        """
        suffix = f"{images_seen:09d}" if isinstance(images_seen, int) else images_seen
        return self.samples / f"{kind}-{suffix}.png"

    def pictures(self, images_seen: int | str) -> Path:
        """Single pictures side by side at their own resolution; "*" as in `sample`."""
        return self.sample("pictures", images_seen)

    @property
    def forward_row(self) -> Path:
        """The forward diffusion of one training picture, drawn once."""
        return self.samples / "forward.png"

    @property
    def validation(self) -> Path:
        """The records and plots of the noise-level validation."""
        return self.path / "validation"

    def validation_record(self, images_seen: int) -> Path:
        """The error of every validation picture at every noise level."""
        return self.validation / f"{images_seen:012d}.json"

    def validation_plot(self, images_seen: int) -> Path:
        """A plot of these errors, averaged over the pictures."""
        return self.validation_record(images_seen).with_suffix(".png")

    @property
    def evaluation(self) -> "EvaluationFolder":
        """Where sdtrain-evaluate writes by default."""
        return EvaluationFolder(self.path / "evaluation")

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    def checkpoint(self, images_seen: int) -> "CheckpointFolder":
        return CheckpointFolder(self.checkpoints / f"{images_seen:012d}")

    @property
    def first_stage(self) -> "RunFolder":
        """The run that trains the autoencoder for this one, if it has a first stage."""
        return RunFolder(self.path / FIRST_STAGE)

    @property
    def is_first_stage(self) -> bool:
        """Whether this run is the first stage of a run or sweep, which resumes it by itself."""
        return self.path.name == FIRST_STAGE

    @property
    def autoencoder(self) -> Path:
        """The trained autoencoder in the layout of diffusers, if the run trains one."""
        return self.path / AUTOENCODER

    @property
    def autoencoder_config(self) -> Path:
        """A file of the autoencoder; if it exists, the whole autoencoder does."""
        return self.autoencoder / "config.json"

    def kept_files(self, part: str, argument: str) -> Path:
        """Copies of the files that an argument of a part of the model names: see
        assemble/kept_files.py.

        part: "conditioner", ...
        """
        return self.path / "parts" / part / argument

    @property
    def csv(self) -> Path:
        """The files of logger=csv."""
        return self.path / "csv"

    @property
    def tensorboard(self) -> Path:
        """The event files of logger=tensorboard."""
        return self.path / "tensorboard"

    @property
    def wandb(self) -> Path:
        """The local files of wandb, including those that still have to be uploaded."""
        return self.path / "wandb"

    @property
    def wandb_id(self) -> Path:
        """The id of the run in wandb, which a resumed run keeps."""
        return self.wandb / "id"

    @property
    def lock(self) -> Path:
        return self.path / ".lock"

    @property
    def trained_by(self) -> Path:
        """The name of the arm whose weights this one copied, if they differ only in sampling."""
        return self.path / "trained_by.txt"

    @property
    def output(self) -> Path:
        """What the process of a sweep's arm printed, stdout and stderr."""
        return self.path / "output.txt"

    def error_log(self, rank: int = 0) -> Path:
        """A rank's error log: the message that was printed when it failed, then the traceback."""
        return self.path / (f"error-rank-{rank}.log" if rank else "error.log")

    def stack(self, rank: int | str) -> Path:
        """The stack traces of a rank that hangs; "*" gives a glob pattern for all ranks."""
        return self.path / f"stuck-rank-{rank}.txt"


def images_seen_of(path: Path) -> int | None:
    """Return the images seen in the name of a file under samples/ or validation/.

    For example 64 for grid-000000064.png; None for any other name.
    """
    match = re.fullmatch(r"(?:[a-z_]+-)?(\d{9,})[.](?:json|png)", path.name)
    return int(match[1]) if match else None


@dataclass(frozen=True)
class CheckpointFolder:
    """The folder checkpoints/<images_seen>/ of a run."""

    path: Path

    @property
    def model(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def ema(self) -> Path:
        return self.path / "ema.safetensors"

    @property
    def trainer(self) -> Path:
        return self.path / "trainer.pt"

    @property
    def config(self) -> Path:
        return self.path / CONFIG

    @property
    def manifest(self) -> Path:
        """The size and SHA-256 of each of the other files."""
        return self.path / "manifest.json"

    @property
    def images_seen(self) -> int:
        """The images that the run had seen when this was saved."""
        return int(self.path.name)

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.path.parent.parent)


@dataclass(frozen=True)
class EvaluationFolder:
    """The folder that sdtrain-evaluate writes."""

    path: Path

    @property
    def numbers(self) -> Path:
        return self.path / "evaluation.json"

    def picture(self, metric: str, name: str = "") -> Path:
        """METRIC.png, or METRIC-NAME.png for a metric that draws several pictures."""
        return self.path / (f"{metric}-{name}.png" if name else f"{metric}.png")


@dataclass(frozen=True)
class PictureFolder:
    """The folder that sdtrain-sample writes."""

    path: Path

    @property
    def grid(self) -> Path:
        """A grid of all pictures with their captions."""
        return self.path / "grid.png"

    @property
    def attention(self) -> Path:
        """A sheet that shows where the network looked for each word."""
        return self.path / "attention.png"

    @property
    def latents(self) -> Path:
        """The noise that the pictures are drawn from, as `latents` [N, C, h, w]."""
        return self.path / "latents.safetensors"

    def picture(self, number: int, seed: int) -> Path:
        """One picture.

        number: its index among the pictures of one call, from 0.
        """
        return self.path / f"{number:05d}-seed{seed}.png"


@dataclass(frozen=True)
class SweepFolder:
    """The folder of a sweep. Each arm is a run in it."""

    path: Path

    @property
    def record(self) -> Path:
        """The command line of the sweep and the names of its arms: see sweep/record.py."""
        return self.path / "sweep.json"

    @property
    def arm_configs(self) -> str:
        """A glob pattern, relative to the folder, for the configurations of its runs."""
        return f"*/{CONFIG}"

    @property
    def hydra_record(self) -> Path:
        """Hydra's own record. It is removed, because it holds secrets that an arm's config.yaml
        hides.
        """
        return self.path / "multirun.yaml"

    def arm(self, name: str) -> RunFolder:
        return RunFolder(self.path / name)

    @property
    def first_stage(self) -> RunFolder:
        """The run that trains the autoencoder that all arms share."""
        return RunFolder(self.path).first_stage

    @property
    def report(self) -> "ReportFolder":
        """Where sdtrain-report writes by default."""
        return ReportFolder(self.path / "report")


@dataclass(frozen=True)
class ReportFolder:
    """The folder that sdtrain-report writes."""

    path: Path

    @property
    def page(self) -> Path:
        """A self-contained page."""
        return self.path / "report.html"

    @property
    def text(self) -> Path:
        """The same as Markdown, with its pictures in separate files."""
        return self.path / "report.md"

    def picture(self, name: str) -> Path:
        return self.path / f"{name}.png"
