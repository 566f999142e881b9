"""Runs reverse diffusion while training: the same prompts and seeds each time."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import lightning.pytorch as L
import torch
from PIL import Image
from torch import Tensor

from sdtrain import pictures
from sdtrain.config.schema import at_least
from sdtrain.diffusion import add_noise
from sdtrain.errors import UserError
from sdtrain.generation.drawing import Drawing, Request
from sdtrain.generation.generate import generate
from sdtrain.generation.steps import compare_steps, draws_noise
from sdtrain.models.modes import eval_mode
from sdtrain.plots import sampler_errors
from sdtrain.randomness import KeyedRandom
from sdtrain.runs.layout import RunFolder
from sdtrain.runs.manifest import sha256_of
from sdtrain.training.callbacks.budget import Costs, fitting
from sdtrain.training.callbacks.ema import EMACallback, averaged_weights
from sdtrain.training.loggers.media import log_picture, log_table
from sdtrain.training.progress import Progress
from sdtrain.training.stopping import Stopping
from sdtrain.types import PictureData

KEY = "callbacks.samples"


@dataclass
class PlannedGrid:
    """pictures: of the grid. guided, stepped: of the sheets of guidance and of sampler steps."""

    cost: float = 0.0
    left_out: list[str] = field(default_factory=list)
    pictures: int = 0
    guided: int = 0
    stepped: int = 0


class SampleGrid(L.Callback):
    """Every `every` images seen and at the end: a captioned grid, and a strip of x_t and the
    predicted x0 along the way of the first picture. Once, at the start: a row of forward diffusion.
    PNG files under samples/, and the same to the logger.

    Args:
        every: images seen between grids, 0 for none.
        num_images: pictures of a grid.
        prompts: what to draw; None takes captions of the data. Repeated in turn when there are
            fewer than num_images.
        seed: the pictures have the seeds seed, seed + 1, ...
        strip_steps: columns of the strip and of the row of forward diffusion.
        guidance_scales: of the grid at the end, a row for each, with the first pictures' prompts
            and seeds; [] draws none.
        sampler_steps: of the sampler's error against its number of steps, at the end: the distances
            from the largest of them; [] draws none.
        drawing: sampler, grid, steps and guidance.
    """

    weight = 4
    on_all_ranks = False

    def __init__(
        self,
        *,
        every: int,
        num_images: int,
        prompts: list[str] | None,
        seed: int,
        strip_steps: int,
        guidance_scales: list[float],
        sampler_steps: list[int],
        drawing: Drawing,
        data: PictureData,
        run_dir: Path,
        ema: EMACallback | None,
    ) -> None:
        at_least(every, 0, f"{KEY}.every")
        at_least(num_images, 1, f"{KEY}.num_images")
        at_least(strip_steps, 2, f"{KEY}.strip_steps")
        check_guidance_scales(guidance_scales)
        check_sampler_steps(sampler_steps, drawing)
        self.every = every
        self.num_images = num_images
        self.prompts = prompts
        self.seed = seed
        self.strip_steps = strip_steps
        self.guidance_scales = guidance_scales
        self.sampler_steps = sampler_steps
        self.drawing = drawing
        self.data = data
        self.run = RunFolder(run_dir)
        self.ema = ema
        self.last_grid: Path | None = None

    def requests(self, trainer: L.Trainer, module: L.LightningModule) -> list[Request]:
        """What is drawn: of the condition, what the model reads. Depth maps are those of held-out
        pictures, whose captions then stand for the data's prompts.
        """
        reads = module.model.conditioner.reads
        held_out = trainer.datamodule.validation
        prompts = self.prompts or self.data.example_prompts(self.num_images)
        requests = []
        for i in range(self.num_images):
            request = Request(self.seed + i)
            if "caption" in reads:
                request = replace(request, prompt=prompts[i % len(prompts)])
            if "label" in reads:
                request = replace(request, label=i * self.data.num_classes // self.num_images)
            if "depth" in reads:
                row = held_out[(i % len(held_out), i % len(held_out))]
                caption = request.prompt if self.prompts or not request.prompt else row.caption
                request = replace(request, depth=row.depth, prompt=caption)
            requests.append(request)
        return requests

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        path = self.run.forward_row
        if trainer.is_global_zero and self.every and not path.exists():
            row = self.forward_row(trainer, module)
            self._show(trainer, module, "forward", row, path)

    def is_due(self, progress: Progress) -> bool:
        return self.every > 0 and (progress.ended or progress.is_due(self.every))

    def plan(
        self, module: L.LightningModule, costs: Costs, allowed: float, *, first: bool, last: bool
    ) -> PlannedGrid:
        """The grid comes first, the sheets at the end share what it leaves."""
        size = self.data.image_size
        planned = PlannedGrid()

        def fit(wanted: int, drawings: list[Drawing], around: float, name: str) -> int:
            """How many pictures, each drawn in all these ways, still fit."""
            one = sum(costs.drawing(module, drawing, size) for drawing in drawings)
            count = fitting(allowed - planned.cost - around, one, wanted)
            if count:
                planned.cost += around + count * one
            if count < wanted:
                planned.left_out.append(f"{name}{count} of {wanted} pictures")
            return count

        around = 3 * costs.page + 2 * self.strip_steps * costs.decode
        planned.pictures = fit(self.num_images, [self.drawing], around, "")
        if last and self.guidance_scales and module.model.conditioner.reads:
            each = [replace(self.drawing, guidance_scale=scale) for scale in self.guidance_scales]
            wanted = min(self.strip_steps, self.num_images)
            planned.guided = fit(wanted, each, costs.page, "guidance of ")
        if last and self.sampler_steps:
            each = [replace(self.drawing, steps=steps) for steps in self.sampler_steps]
            planned.stepped = fit(self.num_images, each, 2 * costs.page, "sampler steps of ")
        return planned

    def look(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        planned: PlannedGrid,
        stopping: Stopping,
    ) -> dict[str, float]:
        with averaged_weights(self.ema, module):
            requests = self.requests(trainer, module)
            if planned.pictures:
                self.draw(trainer, module, requests[: planned.pictures], stopping)
            if planned.guided:
                self.draw_guidance(trainer, module, requests[: planned.guided], stopping)
            if planned.stepped:
                self.draw_steps(trainer, module, requests[: planned.stepped], stopping)
        return {}

    def draw(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        requests: list[Request],
        stopping: Stopping,
    ) -> None:
        """The grid, the strip, and the pictures side by side, for comparisons between runs."""
        model = module.model
        seen = module.progress.images_seen
        size = self.data.image_size
        steps = []

        def note(step: int, x: Tensor, x0: Tensor) -> None:
            if len(steps) < self.drawing.steps:  # the first batch's
                steps.append((step, x[:1].clone(), x0[:1].clone()))

        images = generate(model, requests, self.drawing, size, note, go_on=stopping.go_on)
        scale = self.drawing.guidance_scale
        titles = [request.title(model.conditioner) for request in requests]
        title = f"{seen} images seen, guidance {scale:g}, {self.drawing.steps} steps"
        grid = pictures.grid(images, titles, title=title)
        notes = self.drawing.settings | {"config_sha256": sha256_of(self.run.config)}
        self.last_grid = self.log_picture(trainer, module, "grid", grid, notes)
        stopping.go_on()
        self.log_picture(trainer, module, "strip", self.strip(module, steps))
        described = []
        table = []
        pixels = pictures.to_uint8(images)
        for request, prompt, picture in zip(requests, titles, pixels, strict=True):
            described.append({"prompt": prompt, "seed": request.seed})
            table.append([seen, prompt, request.seed, scale, picture])
        path = self.run.pictures(seen)
        pictures.write_if_room(pictures.row(images), path, {"requests": described} | notes)
        columns = ["images_seen", "prompt", "seed", "guidance_scale", "image"]
        for logger in trainer.loggers:
            log_table(logger, "samples/table", columns, table, seen)

    def draw_guidance(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        requests: list[Request],
        stopping: Stopping,
    ) -> None:
        """What guidance does to the same prompts and seeds."""
        size = self.data.image_size
        rows = []
        for scale in self.guidance_scales:
            drawing = replace(self.drawing, guidance_scale=scale)
            images = generate(module.model, requests, drawing, size, go_on=stopping.go_on)
            rows.append((f"guidance {scale:g}", [pictures.picture(image) for image in images]))
        heads = [request.title(module.model.conditioner) for request in requests]
        self.log_picture(trainer, module, "guidance", pictures.strip_of_rows(rows, heads))

    def draw_steps(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        requests: list[Request],
        stopping: Stopping,
    ) -> None:
        """How many steps it takes."""
        size = self.data.image_size
        compared = compare_steps(
            module.model, requests, self.drawing, size, self.sampler_steps, go_on=stopping.go_on
        )
        heads = [request.title(module.model.conditioner) for request in requests]
        sheet, plot = sampler_errors(compared.pictures, compared.distances, heads)
        self.log_picture(trainer, module, "steps", sheet)
        self.log_picture(trainer, module, "sampler_error", plot)

    @torch.no_grad()
    def forward_row(self, trainer: L.Trainer, module: L.LightningModule) -> Image.Image:
        """One training picture and its latents at rising t, as the network gets to see them."""
        model = module.model
        x0 = model.latents_of_rows([trainer.datamodule.train[(0, 0)]])
        t = torch.linspace(0, 1, self.strip_steps, dtype=torch.float64, device=module.device)
        drawn = KeyedRandom(self.seed, "forward").normal(0, tuple(x0.shape[1:]))
        noise = torch.from_numpy(drawn).to(module.device)
        x = add_noise(x0, noise[None], *model.objective.schedule.alpha_sigma(t))
        heads = [f"t = {time:.2f}" for time in t.tolist()]
        with eval_mode(model.autoencoder):
            decoded = ("x_t, decoded", model.autoencoder.decode(x))
        return pictures.strip([decoded, ("x_t, latents", pictures.latents_as_colours(x))], heads)

    def strip(
        self, module: L.LightningModule, steps: list[tuple[int, Tensor, Tensor]]
    ) -> Image.Image:
        """steps: (number, x_t, x0) of each step of a walk."""
        columns = self.strip_steps
        places = {round(i * (len(steps) - 1) / (columns - 1)) for i in range(columns)}
        shown = [steps[place] for place in sorted(places)]
        decode = module.model.autoencoder.decode
        x = decode(torch.cat([step[1] for step in shown]))
        x0 = decode(torch.cat([step[2] for step in shown]))
        heads = [f"step {step[0] + 1}" for step in shown]
        return pictures.strip([("x_t, decoded", x), ("predicted x0", x0)], heads)

    def log_picture(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        kind: str,
        picture: Image.Image,
        notes: dict[str, object] | None = None,
    ) -> Path | None:
        """Writes a picture of the run as it stands, and shows it to the loggers. None where the
        disk has no room.
        """
        path = self.run.sample(kind, module.progress.images_seen)
        return self._show(trainer, module, kind, picture, path, notes)

    def _show(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        kind: str,
        picture: Image.Image,
        path: Path,
        notes: dict[str, object] | None = None,
    ) -> Path | None:
        written = pictures.write_if_room(picture, path, notes)
        for logger in trainer.loggers:
            log_picture(logger, f"samples/{kind}", picture, module.progress.images_seen)
        return written


def check_guidance_scales(guidance_scales: list[float]) -> None:
    if not all(0 <= scale < math.inf for scale in guidance_scales):
        raise UserError(
            "must be numbers of at least 0 each; [] draws none",
            key=f"{KEY}.guidance_scales",
            value=guidance_scales,
        )


def check_sampler_steps(sampler_steps: list[int], drawing: Drawing) -> None:
    key = f"{KEY}.sampler_steps"
    if not sampler_steps:
        return
    if min(sampler_steps) < 1 or len(set(sampler_steps)) < 2:
        raise UserError(
            "must be several numbers, at least 1 each, as [10,50,1000]; [] draws none",
            key=key,
            value=sampler_steps,
        )
    if draws_noise(drawing):
        raise UserError(
            f"{key} follows the same noise through more steps; sampler "
            f"{drawing.sampler_name} draws fresh noise at each",
            key=key,
            remedy="Choose sampler=ddim.",
        )
