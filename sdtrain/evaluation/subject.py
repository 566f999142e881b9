"""The subject of a metric: a trained model, how it draws, and the data it was trained on."""

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
    """Builds a data set on first access.

    data: the data set. data_class: its class. was_used: whether it has been built.
    """

    was_used: bool

    @property
    def data_class(self) -> type: ...

    @property
    def data(self) -> PictureData: ...


@dataclass
class Subject:
    """What the metrics of one evaluation share.

    Args:
        model: the model with the weights to measure.
        drawing: sampler, grid, steps and guidance.
        image_size: side of the pictures in pixels.
        num_images: how many pictures a metric draws, of each kind that it draws.
        seed: of the first picture; the following pictures count up from it.
        data_source: builds the data set that the model was trained on.
        record: what the run recorded about that data set; None for a run of an earlier version.
    """

    model: LatentDiffusion
    drawing: Drawing
    image_size: int
    num_images: int
    seed: int
    data_source: DataSource
    record: DataRecord | None = None

    @property
    def reads(self) -> frozenset[str]:
        """Which of "caption", "label" and "depth" the model reads."""
        return self.model.reads

    @property
    def data(self) -> PictureData:
        """The data set, built on first access. Raises UserError if it no longer exists."""
        return self.data_source.data

    @property
    def prompts(self) -> list[str]:
        """num_images captions of the data; empty ones if the model reads no captions."""
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
            labels = [number * classes // self.num_images for number in range(self.num_images)]
        requests = []
        for number, (prompt, label) in enumerate(zip(self.prompts, labels, strict=True)):
            requests.append(Request(self.seed + number, prompt=prompt, label=label))
        return requests

    @cached_property
    def samples(self) -> Tensor:
        """Pictures [num_images, 3, H, W] in [-1, 1] of `requests`, drawn once for all metrics."""
        return self.draw(self.requests)

    def draw(self, requests: list[Request]) -> Tensor:
        """Return pictures [N, 3, H, W] in [-1, 1] of N other requests, on the CPU."""
        return generate(self.model, requests, self.drawing, self.image_size)
