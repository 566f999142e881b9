"""What is measured: a trained model, the way it draws, and the data it was trained on."""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from torch import Tensor

from sdtrain.generation.drawing import Drawing, Request
from sdtrain.generation.generate import generate
from sdtrain.latent_diffusion import LatentDiffusion
from sdtrain.runs.data_record import DataRecord
from sdtrain.types import PictureData


class DataSource(Protocol):
    """data: the data set, made when it is first asked for. kind: its class. was_used: whether it
    has been made.
    """

    was_used: bool

    @property
    def kind(self) -> type: ...

    @property
    def data(self) -> PictureData: ...


@dataclass
class Subject:
    """All that the metrics of one evaluation share.

    Args:
        model: with the weights that are measured.
        drawing: sampler, grid, steps and guidance.
        image_size: side of the pictures, in pixels.
        num_images: how many pictures a metric draws, of each kind that it draws.
        seed: of the first picture; the others count up.
        source: gives the data set that the model was trained on.
        record: what the run remembers of it; None of a run that an earlier version trained.
    """

    model: LatentDiffusion
    drawing: Drawing
    image_size: int
    num_images: int
    seed: int
    source: DataSource
    record: DataRecord | None = None

    @property
    def reads(self) -> frozenset[str]:
        """What the model is told of: "caption", "label", "depth"."""
        return self.model.conditioner.reads

    @property
    def data(self) -> PictureData:
        """The data set, made when it is first asked for. Raises UserError where it is gone."""
        return self.source.data

    @property
    def prompts(self) -> list[str]:
        """num_images captions of the data; empty ones where the model reads none."""
        if "caption" not in self.reads:
            return [""] * self.num_images
        if self.record is not None:
            return self.record.prompts(self.num_images)
        return self.data.example_prompts(self.num_images)

    @cached_property
    def requests(self) -> list[Request]:
        """num_images requests, spread over the captions and classes that the model reads."""
        labels = [0] * self.num_images
        if "label" in self.reads:
            classes = self.model.conditioner.num_classes or (self.record or self.data).num_classes
            labels = [place * classes // self.num_images for place in range(self.num_images)]
        requests = []
        for place, (prompt, label) in enumerate(zip(self.prompts, labels, strict=True)):
            requests.append(Request(self.seed + place, prompt=prompt, label=label))
        return requests

    @cached_property
    def samples(self) -> Tensor:
        """Pictures of `requests` [num_images, 3, H, W] in [-1, 1], drawn once for all metrics."""
        return self.draw(self.requests)

    def draw(self, requests: list[Request]) -> Tensor:
        """Pictures [N, 3, H, W] in [-1, 1] of other requests, on the CPU."""
        return generate(self.model, requests, self.drawing, self.image_size)
