"""Runs reverse diffusion while training: the same prompts and seeds each time."""

import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as L
import torch
from PIL import Image
from torch import Tensor

from sdtrain import pictures
from sdtrain.diffusion import add_noise
from sdtrain.generation.generate import Drawing, Request, by_steps, draws_noise, generate
from sdtrain.plots import sampler_errors
from sdtrain.randomness import KeyedRandom
from sdtrain.training.callbacks.ema import EMACallback
from sdtrain.training.callbacks.intervals import due, ended, window_ended
from sdtrain.training.loggers.wandb import log_picture, log_table
from sdtrain.types import PictureData


class SampleGrid(L.Callback):
    """Every `every` images seen and at the end: a captioned grid, and a strip of x_t and the predicted x0 along the way of the first
    picture. Once, at the start: a row of forward diffusion. PNG files under samples/, and the same to the logger.

    Args:
        every: images seen between grids, 0 for none.
        num_images: pictures of a grid.
        prompts: what to draw; None takes captions of the data. Repeated in turn when there are fewer than num_images.
        seed: the pictures have the seeds seed, seed + 1, ...
        strip_steps: columns of the strip and of the row of forward diffusion.
        guidance_scales: of the grid at the end, a row for each, with the first pictures' prompts and seeds; [] draws none.
        sampler_steps: of the sampler's error against its number of steps, at the end: the distances from the largest of them; [] draws none.
        drawing: sampler, grid, steps and guidance.
    """

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
        if num_images < 1 or strip_steps < 2:
            raise ValueError(
                f"callbacks.samples.num_images={num_images} must be at least 1 and strip_steps={strip_steps} at least 2."
            )
        if every < 0:
            raise ValueError(f"callbacks.samples.every={every} must be at least 0; 0 draws none.")
        self.every, self.num_images, self.prompts, self.seed, self.strip_steps = (
            every,
            num_images,
            prompts,
            seed,
            strip_steps,
        )
        if not all(0 <= scale < math.inf for scale in guidance_scales):
            raise ValueError(
                f"callbacks.samples.guidance_scales={guidance_scales} must be numbers of at least 0 each; [] draws none."
            )
        if sampler_steps and (min(sampler_steps) < 1 or len(set(sampler_steps)) < 2):
            raise ValueError(
                f"callbacks.samples.sampler_steps={sampler_steps} must be several numbers, at least 1 each, as [10,50,1000]; [] draws none."
            )
        if sampler_steps and draws_noise(drawing):
            raise ValueError(
                "callbacks.samples.sampler_steps follows the same noise through more steps; this sampler draws fresh noise. Choose sampler=ddim."
            )
        self.guidance_scales, self.sampler_steps, self.drawing = (
            guidance_scales,
            sampler_steps,
            drawing,
        )
        self.data, self.folder, self.ema = data, run_dir / "samples", ema
        self.last_grid: Path | None = None

    def requests(self, module: L.LightningModule) -> list[Request]:
        prompts, reads = (
            self.prompts or self.data.example_prompts(self.num_images),
            module.conditioner.reads,
        )
        spread = [i * self.data.num_classes // self.num_images for i in range(self.num_images)]
        return [
            Request(
                self.seed + i,
                prompt=prompts[i % len(prompts)] if reads == "caption" else "",
                label=spread[i] if reads == "label" else 0,
            )
            for i in range(self.num_images)
        ]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero and self.every and not (self.folder / "forward.png").exists():
            self.log_picture(trainer, "forward", self.forward_row(trainer, module))

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_index: int
    ) -> None:
        last = ended(trainer, module)
        if (
            window_ended(trainer)
            and trainer.is_global_zero
            and (due(self.every, trainer) or (last and self.every))
        ):
            self.draw(trainer, module)
            if last and self.guidance_scales and module.conditioner.reads != "nothing":
                self.draw_guidance(trainer, module)
            if last and self.sampler_steps:
                self.draw_steps(trainer, module)

    def draw_guidance(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """What guidance does to the same prompts and seeds."""
        seen, requests, rows = (
            trainer.datamodule.images_seen,
            self.requests(module)[: self.strip_steps],
            [],
        )
        with self.ema.average.applied(module.trained()) if self.ema else nullcontext():
            for scale in self.guidance_scales:
                images = generate(
                    module,
                    requests,
                    replace(self.drawing, guidance_scale=scale),
                    self.data.image_size,
                )
                rows.append((f"guidance {scale:g}", [pictures.picture(image) for image in images]))
        heads = [self.caption(module, request) for request in requests]
        self.log_picture(trainer, f"guidance-{seen:09d}", pictures.strip_of_rows(rows, heads))

    def draw_steps(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """How many steps it takes."""
        seen, requests = trainer.datamodule.images_seen, self.requests(module)
        with self.ema.average.applied(module.trained()) if self.ema else nullcontext():
            drawn, far = by_steps(
                module, requests, self.drawing, self.data.image_size, self.sampler_steps
            )
        sheet, plot = sampler_errors(
            drawn, far, [self.caption(module, request) for request in requests]
        )
        self.log_picture(trainer, f"steps-{seen:09d}", sheet)
        self.log_picture(trainer, f"sampler_error-{seen:09d}", plot)

    @staticmethod
    def caption(module: L.LightningModule, request: Request) -> str:
        return request.prompt or (
            f"class {request.label}"
            if module.conditioner.reads == "label"
            else f"seed {request.seed}"
        )

    @torch.no_grad()
    def forward_row(self, trainer: L.Trainer, module: L.LightningModule) -> Image.Image:
        """One training picture and its latents at rising t, as the network gets to see them."""
        row = trainer.datamodule.train[(0, 0)]
        x0 = module.autoencoder.encode(row.image[None].to(module.device))
        t = torch.linspace(0, 1, self.strip_steps, dtype=torch.float64, device=module.device)
        noise = torch.from_numpy(
            KeyedRandom(self.seed, "forward").normal(0, tuple(x0.shape[1:]))
        ).to(module.device)
        x = add_noise(x0, noise[None], *module.objective.schedule.alpha_sigma(t))
        heads = [f"t = {time:.2f}" for time in t.tolist()]
        rows = [
            ("x_t, decoded", module.autoencoder.decode(x)),
            ("x_t, latents", pictures.latents_as_colours(x)),
        ]
        return pictures.strip(rows, heads)

    def draw(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        seen, requests = trainer.datamodule.images_seen, self.requests(module)
        size, steps = self.data.image_size, []
        with self.ema.average.applied(module.trained()) if self.ema else nullcontext():
            images = generate(module, requests, self.drawing, size)
            generate(
                module,
                requests[:1],
                self.drawing,
                size,
                show=lambda step, x, x0: steps.append((step, x, x0)),
            )
        captions = [self.caption(module, request) for request in requests]
        title = f"{seen} images seen, guidance {self.drawing.guidance_scale:g}, {self.drawing.steps} steps"
        self.last_grid = self.log_picture(
            trainer, f"grid-{seen:09d}", pictures.grid(images, captions, title=title)
        )
        self.log_picture(trainer, f"strip-{seen:09d}", self.strip(module, steps))
        # As they were drawn, for comparisons between runs.
        asked = {
            "requests": [
                {"prompt": caption, "seed": request.seed}
                for request, caption in zip(requests, captions, strict=True)
            ]
        }
        pictures.write_if_room(
            pictures.row(images), self.folder / f"pictures-{seen:09d}.png", asked
        )
        columns = ["images_seen", "prompt", "seed", "guidance_scale", "image"]
        rows = [
            [seen, caption, request.seed, self.drawing.guidance_scale, pixels]
            for request, caption, pixels in zip(
                requests, captions, pictures.to_uint8(images), strict=True
            )
        ]
        for logger in trainer.loggers:
            log_table(logger, "samples/table", columns, rows, seen)

    def strip(
        self, module: L.LightningModule, steps: list[tuple[int, Tensor, Tensor]]
    ) -> Image.Image:
        places = sorted(
            {round(i * (len(steps) - 1) / (self.strip_steps - 1)) for i in range(self.strip_steps)}
        )
        x, x0 = (torch.cat([steps[place][k] for place in places]) for k in (1, 2))
        decode = module.autoencoder.decode
        return pictures.strip(
            [("x_t, decoded", decode(x)), ("predicted x0", decode(x0))],
            [f"step {steps[place][0] + 1}" for place in places],
        )

    def log_picture(self, trainer: L.Trainer, name: str, picture: Image.Image) -> Path | None:
        path = pictures.write_if_room(picture, self.folder / f"{name}.png")
        for logger in trainer.loggers:
            log_picture(
                logger, f"samples/{name.partition('-')[0]}", picture, trainer.datamodule.images_seen
            )
        return path
