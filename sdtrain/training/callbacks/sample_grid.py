"""Samples during training, with the same prompts and seeds each time."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import lightning.pytorch as L
from PIL import Image
from torch import Tensor

from sdtrain import pictures
from sdtrain.config.schema import check_at_least
from sdtrain.errors import UserError
from sdtrain.files import sha256_of
from sdtrain.generation.attention_maps import (
    attention_sheet,
    check_attention,
    draw_with_attention,
)
from sdtrain.generation.drawing import Drawing, Request
from sdtrain.generation.generate import generate
from sdtrain.generation.sheets import (
    denoising_strip,
    forward_row,
    shown_conditions,
    with_conditions,
)
from sdtrain.generation.steps import check_compared_steps, compare_steps
from sdtrain.plots import draw_sampler_errors
from sdtrain.runs.layout import RunFolder
from sdtrain.training.callbacks.before_and_after import before_and_after, notes_in
from sdtrain.training.callbacks.budget import Costs, affordable_count
from sdtrain.training.callbacks.ema import EMACallback, averaged_weights
from sdtrain.training.callbacks.grid_requests import grid_requests
from sdtrain.training.loggers.media import log_picture, log_table
from sdtrain.training.progress import Progress
from sdtrain.training.stopping import Stopping
from sdtrain.types import PictureData

KEY = "callbacks.samples"


@dataclass
class PlannedGrid:
    """Number of pictures on each sheet; 0 if the sheet is not drawn.

    pictures: in the grid. attended: rows of the sheet of attention. guided: columns of the sheet of
    guidance scales. stepped: columns of the sheet of sampler steps.
    """

    cost: float = 0.0
    left_out: list[str] = field(default_factory=list)
    pictures: int = 0
    attended: int = 0
    guided: int = 0
    stepped: int = 0


class SampleGrid(L.Callback):
    """Samples a captioned grid of pictures every `every` images seen and at the end, and a strip of
    x_t and the predicted x0 during the sampling of the first picture.

    Draws a row of forward diffusion once, at the start, and comparisons of guidance scales and of
    numbers of sampler steps at the end. A model that starts with pretrained weights is also sampled
    before the first step, and at the end beside that. Writes PNG files under samples/, and logs
    them too.

    Args:
        every: images seen between grids; 0 draws none.
        num_images: pictures in a grid.
        prompts: prompts of the pictures, repeated if there are fewer than num_images; None takes
            captions of the data.
        seed: the pictures have the seeds seed, seed + 1, ...
        strip_steps: columns of the strip and of the row of forward diffusion.
        guidance_scales: rows of the sheet that compares guidance scales at the end, drawn with the
            prompts and seeds of the first pictures; [] draws none.
        attention: pictures of which a sheet shows where the network looked for each word, beside
            each grid; 0 draws none.
        sampler_steps: numbers of steps to compare at the end: plots the distance of each result
            from that of the largest number; [] draws none.
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
        attention: int,
        drawing: Drawing,
        data: PictureData,
        run_dir: Path,
        ema: EMACallback | None,
    ) -> None:
        check_at_least(every, 0, f"{KEY}.every")
        check_at_least(num_images, 1, f"{KEY}.num_images")
        check_at_least(attention, 0, f"{KEY}.attention")
        check_at_least(strip_steps, 2, f"{KEY}.strip_steps")
        check_guidance_scales(guidance_scales)
        check_compared_steps(sampler_steps, drawing, f"{KEY}.sampler_steps")
        self.every = every
        self.num_images = num_images
        self.prompts = prompts
        self.seed = seed
        self.strip_steps = strip_steps
        self.guidance_scales = guidance_scales
        self.sampler_steps = sampler_steps
        self.attention = attention
        self.drawing = drawing
        self.data = data
        self.run = RunFolder(run_dir)
        self.ema = ema
        self.last_grid: Path | None = None

    def requests(self, trainer: L.Trainer, module: L.LightningModule) -> list[Request]:
        """Return a request for each picture of the grid, with the conditions that the model
        reads.
        """
        return grid_requests(
            module.model.reads,
            self.data,
            trainer.datamodule.validation,
            prompts=self.prompts,
            count=self.num_images,
            seed=self.seed,
        )

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.attention:
            check_attention(module.model, f"{KEY}.attention", self.attention)
        path = self.run.forward_row
        if trainer.is_global_zero and self.every and not path.exists():
            latents = module.model.latents_of_rows([trainer.datamodule.train[(0, 0)]])
            row = forward_row(module.model, latents, self.strip_steps, self.seed)
            self._show(trainer, module, "forward", row, path)

    def plan_at_start(self, module: L.LightningModule, costs: Costs, allowed: float) -> PlannedGrid:
        planned = PlannedGrid()
        if self.every and _is_pretrained(module):
            each = costs.drawing(module, self.drawing, self.data.image_size)
            overhead = self._grid_overhead(costs)
            planned.pictures = affordable_count(allowed - overhead, each, self.num_images)
            if planned.pictures:
                planned.cost = overhead + planned.pictures * each
            if planned.pictures < self.num_images:
                reduced = f"before the first step {planned.pictures} of {self.num_images} pictures"
                planned.left_out.append(reduced)
        return planned

    def look_at_start(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        planned: PlannedGrid,
        stopping: Stopping,
    ) -> None:
        requests = self.requests(trainer, module)[: planned.pictures]
        if notes_in(self.run, 0) != self._notes(module, requests):  # not of this run, or none
            self.draw(trainer, module, requests, stopping)

    def _grid_overhead(self, costs: Costs) -> float:
        """Return the cost of a grid's files beside its pictures."""
        return 3 * costs.page + 2 * self.strip_steps * costs.decode

    def is_due(self, progress: Progress) -> bool:
        return self.every > 0 and (progress.ended or progress.is_due(self.every))

    def plan(
        self, module: L.LightningModule, costs: Costs, allowed: float, *, first: bool, last: bool
    ) -> PlannedGrid:
        """Plan the grid first; the sheets at the end get what it leaves of the budget."""
        size = self.data.image_size
        planned = PlannedGrid()

        def fit(wanted: int, drawings: list[Drawing], overhead: float, name: str) -> int:
            """Return how many pictures, each sampled with all `drawings`, the budget allows, and
            add their cost.
            """
            cost_each = sum(costs.drawing(module, drawing, size) for drawing in drawings)
            count = affordable_count(allowed - planned.cost - overhead, cost_each, wanted)
            if count:
                planned.cost += overhead + count * cost_each
            if count < wanted:
                planned.left_out.append(f"{name}{count} of {wanted} pictures")
            return count

        overhead = self._grid_overhead(costs)
        if last and _is_pretrained(module):
            overhead += costs.page
        planned.pictures = fit(self.num_images, [self.drawing], overhead, "")
        if self.attention:
            drawings = [self.drawing, replace(self.drawing, guidance_scale=1.0)]
            wanted = min(self.attention, self.num_images)
            planned.attended = fit(wanted, drawings, costs.page, "attention of ")
        if last and self.guidance_scales and module.model.reads:
            wanted = min(self.strip_steps, self.num_images)
            planned.guided = fit(wanted, self._guidance_drawings(), costs.page, "guidance of ")
        if last and self.sampler_steps:
            drawings = [replace(self.drawing, steps=steps) for steps in self.sampler_steps]
            planned.stepped = fit(self.num_images, drawings, 2 * costs.page, "sampler steps of ")
        return planned

    def _guidance_drawings(self) -> list[Drawing]:
        return [replace(self.drawing, guidance_scale=scale) for scale in self.guidance_scales]

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
                if module.progress.ended and _is_pretrained(module):
                    seen = module.progress.images_seen
                    sheet = before_and_after(
                        self.run, seen, self.strip_steps, list(self.drawing.settings)
                    )
                    if sheet is not None:
                        self.log_picture(trainer, module, "before_and_after", sheet)
            if planned.attended:
                self.draw_attention(trainer, module, requests[: planned.attended], stopping)
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
        """Draw the grid, the strip, and a file of the pictures side by side for comparisons between
        runs.
        """
        model = module.model
        seen = module.progress.images_seen
        size = self.data.image_size
        steps = []

        def record_step(step: int, x: Tensor, x0: Tensor) -> None:
            if len(steps) < self.drawing.steps:  # only the steps of the first batch
                steps.append((step, x[:1].clone(), x0[:1].clone()))

        images = generate(
            model,
            requests,
            self.drawing,
            size,
            record_step,
            on_evaluation=stopping.check_interrupted,
        )
        scale = self.drawing.guidance_scale
        titles = [request.title(model.conditioner) for request in requests]
        title = f"{seen} images seen, guidance {scale:g}, {self.drawing.steps} steps"
        grid = pictures.grid(*with_conditions(requests, images, titles), title=title)
        notes = self._notes(module, requests)
        of_grid = {key: value for key, value in notes.items() if key != "requests"}
        self.last_grid = self.log_picture(trainer, module, "grid", grid, of_grid)
        stopping.check_interrupted()
        strip = denoising_strip(model.autoencoder, steps, self.strip_steps)
        self.log_picture(trainer, module, "strip", strip)
        table = []
        pixels = pictures.to_uint8(images)
        for request, prompt, picture in zip(requests, titles, pixels, strict=True):
            conditions = [pictures.to_uint8(each[None])[0] for each, _ in shown_conditions(request)]
            table.append([seen, prompt, request.seed, scale, *conditions, picture])
        path = self.run.pictures(seen)
        pictures.write_png_or_warn(pictures.side_by_side(images), path, notes)
        columns = ["images_seen", "prompt", "seed", "guidance_scale", "image"]
        columns[-1:-1] = [name for _, name in shown_conditions(requests[0])]
        for logger in trainer.loggers:
            log_table(logger, "samples/table", columns, table, seen)

    def _notes(self, module: L.LightningModule, requests: list[Request]) -> dict[str, object]:
        """Return what a file of pictures stores: prompts and seeds, sampler, configuration."""
        asked = []
        for request in requests:
            asked.append({"prompt": request.title(module.model.conditioner), "seed": request.seed})
        settings = self.drawing.settings | {"config_sha256": sha256_of(self.run.config)}
        return {"requests": asked} | settings

    def draw_attention(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        requests: list[Request],
        stopping: Stopping,
    ) -> None:
        """Draw where the network looks for each word of the first prompts."""
        images, maps = draw_with_attention(
            module.model,
            requests,
            self.drawing,
            self.data.image_size,
            on_evaluation=stopping.check_interrupted,
        )
        self.log_picture(trainer, module, "attention", attention_sheet(images, maps))

    def draw_guidance(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        requests: list[Request],
        stopping: Stopping,
    ) -> None:
        """Draw the same prompts and seeds with each guidance scale."""
        size = self.data.image_size
        rows = []
        for drawing in self._guidance_drawings():
            images = generate(
                module.model, requests, drawing, size, on_evaluation=stopping.check_interrupted
            )
            title = f"guidance {drawing.guidance_scale:g}"
            rows.append((title, [pictures.to_image(image) for image in images]))
        heads = [request.title(module.model.conditioner) for request in requests]
        self.log_picture(trainer, module, "guidance", pictures.strip_of_rows(rows, heads))

    def draw_steps(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        requests: list[Request],
        stopping: Stopping,
    ) -> None:
        """Draw the same prompts and seeds with each number of sampler steps, and plot the error."""
        size = self.data.image_size
        compared = compare_steps(
            module.model,
            requests,
            self.drawing,
            size,
            self.sampler_steps,
            on_evaluation=stopping.check_interrupted,
        )
        heads = [request.title(module.model.conditioner) for request in requests]
        sheet, plot = draw_sampler_errors(compared.pictures, compared.distances, heads)
        self.log_picture(trainer, module, "steps", sheet)
        self.log_picture(trainer, module, "sampler_error", plot)

    def log_picture(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        kind: str,
        picture: Image.Image,
        notes: dict[str, object] | None = None,
    ) -> Path | None:
        """Write a picture to a file named after the images seen, and log it.

        Returns the path, or None if the disk is full.
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
        written_path = pictures.write_png_or_warn(picture, path, notes)
        for logger in trainer.loggers:
            log_picture(logger, f"samples/{kind}", picture, module.progress.images_seen)
        return written_path


def _is_pretrained(module: L.LightningModule) -> bool:
    """Whether the unet started with pretrained weights."""
    return getattr(module.model.unet, "is_pretrained", False)


def check_guidance_scales(guidance_scales: list[float]) -> None:
    """Raise UserError if a guidance scale is negative or not finite."""
    if not all(0 <= scale < math.inf for scale in guidance_scales):
        raise UserError(
            "must be a list of finite numbers, each at least 0; [] draws none",
            key=f"{KEY}.guidance_scales",
            value=guidance_scales,
        )
