"""How the files of a run are called. No other module spells their names."""

import re
from dataclasses import dataclass
from pathlib import Path

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
AUTOENCODER = "autoencoder"
FIRST_STAGE = "first_stage"
FIRST_STAGE_AUTOENCODER = f"{FIRST_STAGE}/{AUTOENCODER}"
"""What a first stage leaves behind, as a path below the run that it was trained for."""
DAMAGED = ".damaged"
"""Suffix of a checkpoint that was set aside."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run, finished or not."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config(self) -> Path:
        """The resolved configuration, yaml."""
        return self.path / CONFIG

    @property
    def data_record(self) -> Path:
        """What drawing needs to know of the data: see runs/data_record.py."""
        return self.path / "data.json"

    @property
    def status(self) -> Path:
        """State, process, images seen, exit code: see runs/status.py."""
        return self.path / "status.json"

    @property
    def metrics(self) -> Path:
        """A line of JSON for each set of logged numbers, by images seen."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Grids, strips and single pictures drawn while training."""
        return self.path / "samples"

    def sample(self, kind: str, images_seen: int | str) -> Path:
        """A picture drawn at some point of the run; "*" for a pattern of all.

        kind: "grid", "strip", ...
        """
        seen = f"{images_seen:09d}" if isinstance(images_seen, int) else images_seen
        return self.samples / f"{kind}-{seen}.png"

    def pictures(self, images_seen: int | str) -> Path:
        """Single pictures side by side in their own pixels; "*" for a pattern of all."""
        return self.sample("pictures", images_seen)

    @property
    def forward_row(self) -> Path:
        """Forward diffusion of one training picture, drawn once."""
        return self.samples / "forward.png"

    @property
    def validation(self) -> Path:
        """Records and plots of the noise-level validation."""
        return self.path / "validation"

    def validation_record(self, images_seen: int) -> Path:
        """The error of every held-out picture at every noise level."""
        return self.validation / f"{images_seen:012d}.json"

    def validation_plot(self, images_seen: int) -> Path:
        """The same as curves, of the mean over the pictures."""
        return self.validation_record(images_seen).with_suffix(".png")

    @property
    def evaluation(self) -> "EvaluationFolder":
        """Where sdtrain-evaluate writes unless told otherwise."""
        return EvaluationFolder(self.path / "evaluation")

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    def checkpoint(self, images_seen: int) -> "CheckpointFolder":
        return CheckpointFolder(self.checkpoints / f"{images_seen:012d}")

    @property
    def first_stage(self) -> "RunFolder":
        """The run that trains this one's autoencoder, where it brings one along."""
        return RunFolder(self.path / FIRST_STAGE)

    @property
    def is_first_stage(self) -> bool:
        """Whether it lies in the folder of a run, or of a sweep, that goes on by itself."""
        return self.path.name == FIRST_STAGE

    @property
    def autoencoder(self) -> Path:
        """The trained autoencoder in diffusers' layout, of a run that trains one."""
        return self.path / AUTOENCODER

    @property
    def autoencoder_config(self) -> Path:
        """Where it is there, so is the whole autoencoder."""
        return self.autoencoder / "config.json"

    def kept(self, part: str, argument: str) -> Path:
        """Copies of the files that an argument of a part of the model names, see
        assemble/kept_files.py. part: "conditioner", ...
        """
        return self.path / "parts" / part / argument

    @property
    def csv(self) -> Path:
        """Of logger=csv."""
        return self.path / "csv"

    @property
    def tensorboard(self) -> Path:
        """Event files, of logger=tensorboard."""
        return self.path / "tensorboard"

    @property
    def wandb(self) -> Path:
        """What wandb keeps of the run, and what waits for an upload."""
        return self.path / "wandb"

    @property
    def wandb_id(self) -> Path:
        """wandb's id of the run, under which a resumed one goes on."""
        return self.wandb / "id"

    @property
    def lock(self) -> Path:
        return self.path / ".lock"

    @property
    def trained_by(self) -> Path:
        """The name of the arm whose weights this one was given, of arms that differ in sampling."""
        return self.path / "trained_by.txt"

    @property
    def output(self) -> Path:
        """What an arm of a sweep has printed."""
        return self.path / "output.txt"

    def error_log(self, rank: int = 0) -> Path:
        """Its first line is the paragraph that was printed, the traceback follows."""
        return self.path / (f"error-rank-{rank}.log" if rank else "error.log")

    def stack(self, rank: int | str) -> Path:
        """Where the stacks of a rank that hangs are written; "*" for a pattern of all."""
        return self.path / f"stuck-rank-{rank}.txt"


def images_seen_of(path: Path) -> int | None:
    """The images seen in the name of a file under samples/ or validation/: grid-000000064.png."""
    match = re.fullmatch(r"(?:[a-z_]+-)?(\d{9,})[.](?:json|png)", path.name)
    return int(match[1]) if match else None


@dataclass(frozen=True)
class CheckpointFolder:
    """checkpoints/<images_seen>/ of a run."""

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
        """Size and sha256 of the other files."""
        return self.path / "manifest.json"

    @property
    def images_seen(self) -> int:
        """By the run, when it was saved."""
        return int(self.path.name)

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.path.parent.parent)


@dataclass(frozen=True)
class EvaluationFolder:
    """What sdtrain-evaluate leaves behind."""

    path: Path

    @property
    def numbers(self) -> Path:
        return self.path / "evaluation.json"

    def picture(self, metric: str, name: str = "") -> Path:
        """METRIC.png, or METRIC-NAME.png of a metric that draws several."""
        return self.path / (f"{metric}-{name}.png" if name else f"{metric}.png")


@dataclass(frozen=True)
class PictureFolder:
    """What sdtrain-sample leaves behind."""

    path: Path

    @property
    def grid(self) -> Path:
        """All pictures in one, captioned."""
        return self.path / "grid.png"

    def picture(self, number: int, seed: int) -> Path:
        """number: its place among the pictures of one call, from 0."""
        return self.path / f"{number:05d}-seed{seed}.png"


@dataclass(frozen=True)
class SweepFolder:
    """The folder of a sweep; its arms are runs in it."""

    path: Path

    @property
    def record(self) -> Path:
        """The words of the sweep and the names of its arms: see sweep/record.py."""
        return self.path / "sweep.json"

    @property
    def arm_configs(self) -> str:
        """A pattern below the folder: the configurations of all that lies in it."""
        return f"*/{CONFIG}"

    @property
    def hydra_record(self) -> Path:
        """Hydra's own record, which is removed: it holds what an arm's config.yaml hides."""
        return self.path / "multirun.yaml"

    def arm(self, name: str) -> RunFolder:
        return RunFolder(self.path / name)

    @property
    def first_stage(self) -> RunFolder:
        """The run that trains the autoencoder of all arms."""
        return RunFolder(self.path).first_stage

    @property
    def report(self) -> "ReportFolder":
        """Where sdtrain-report writes unless told otherwise."""
        return ReportFolder(self.path / "report")


@dataclass(frozen=True)
class ReportFolder:
    """What sdtrain-report leaves behind."""

    path: Path

    @property
    def page(self) -> Path:
        """One page that needs nothing beside it."""
        return self.path / "report.html"

    @property
    def text(self) -> Path:
        """The same as Markdown, with its pictures beside it."""
        return self.path / "report.md"

    def picture(self, name: str) -> Path:
        return self.path / f"{name}.png"
