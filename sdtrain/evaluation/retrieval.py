"""Measure how often the training picture of a sample's caption is the nearest to the sample."""

import torch
from PIL import Image
from torch import Tensor

from sdtrain import pictures
from sdtrain.config.schema import check_at_least
from sdtrain.console import warn
from sdtrain.errors import UserError
from sdtrain.evaluation.metric import CAPTIONS, REFERENCES, Measurement, Metric, percent
from sdtrain.evaluation.subject import Subject
from sdtrain.generation.drawing import Request
from sdtrain.latent_diffusion import LatentDiffusion
from sdtrain.types import Row

BATCH = 128
"""Pictures encoded at once."""


class Retrieval(Metric):
    """Share of the samples whose nearest training picture is the one their caption belongs to.

    Samples are drawn for training captions, and distances are taken between latents.

    Args:
        max_pictures: the largest allowed number of training pictures, because each sample is
            compared with all of them.
    """

    needs = frozenset({CAPTIONS, REFERENCES})
    gives = frozenset({"caption", "depth"})
    unit = "share of the pictures"
    higher_is_better = True

    def __init__(self, *, max_pictures: int = 20000) -> None:
        check_at_least(max_pictures, 1, "metrics.retrieval.max_pictures")
        self.max_pictures = max_pictures

    def check(self, subject: Subject) -> None:
        count = len(subject.data.split("train"))
        if count > self.max_pictures:
            raise UserError(
                f"compares each sample with every training picture; {count} are more than "
                f"metrics.retrieval.max_pictures={self.max_pictures}",
                key="metrics",
                value="retrieval",
                remedy="Choose metrics=prompt_accuracy.",
            )

    @torch.no_grad()
    def measure(self, subject: Subject) -> Measurement:
        train = subject.data.split("train")
        rows = [train[(index, index)] for index in range(len(train))]
        count = min(subject.num_images, len(rows))
        if count < subject.num_images:
            warn(
                f"retrieval: num_images={subject.num_images}, but there are only {count} training "
                "pictures: one sample is drawn for each."
            )
        wanted = []
        wanted_rows = []
        requests = []
        for number in range(count):
            index = number * len(rows) // count
            wanted.append(index)
            wanted_rows.append(rows[index])
            request = Request(
                subject.seed + index, prompt=rows[index].caption, depth=rows[index].depth
            )
            requests.append(request)
        images = subject.draw(requests)
        model = subject.model
        drawn = model.latents(images.to(model.device)).cpu()
        shares = nearest_picture_share(drawn, latents_of(model, rows), torch.tensor(wanted))
        chance = {"top_1": 1 / len(rows), "top_5": min(1.0, 5 / len(rows))}
        sheet = _sheet(model, wanted_rows, images)
        return Measurement({"measured": shares, "chance": chance}, {"": sheet})

    def format(self, value: float) -> str:
        return percent(value)


def latents_of(model: LatentDiffusion, rows: list[Row]) -> Tensor:
    """Return the latents [N, C, h, w] of rows, on the CPU."""
    parts = []
    for start in range(0, len(rows), BATCH):
        parts.append(model.latents_of_rows(rows[start : start + BATCH]).cpu())
    return torch.cat(parts)


def nearest_picture_share(drawn: Tensor, pictures: Tensor, wanted: Tensor) -> dict[str, float]:
    """Return how often the wanted picture is the nearest (top_1) or among the nearest five (top_5).

    Args:
        drawn: [M, ...], latents of samples; distances are Euclidean.
        pictures: [N, ...], latents of all training pictures.
        wanted: [M], the index of the picture that each sample should be nearest to.
    """
    distance = torch.cdist(drawn.flatten(1), pictures.flatten(1))
    nearer = (distance < distance.gather(1, wanted[:, None])).sum(1)
    return {
        "top_1": (nearer < 1).double().mean().item(),
        "top_5": (nearer < 5).double().mean().item(),
    }


def _sheet(model: LatentDiffusion, rows: list[Row], images: Tensor) -> Image.Image:
    """Return a grid of the training pictures, each above the sample of its caption."""
    if rows[0].image is None:  # the rows have moments of latents instead
        above = model.autoencoder.decode(latents_of(model, rows).to(model.device)).cpu()
    else:
        above = torch.stack([row.image for row in rows])
    captions = [row.caption for row in rows]
    title = "training pictures above the samples of their captions"
    return pictures.grid(torch.cat([above, images], dim=2), captions, columns=8, title=title)
