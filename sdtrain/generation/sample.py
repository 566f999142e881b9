"""Pictures on request: what sdtrain-sample draws and writes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sdtrain import pictures
from sdtrain.conditioning.interface import Conditioner
from sdtrain.config.reading import as_list
from sdtrain.config.schema import SampleConfig
from sdtrain.console import warn
from sdtrain.errors import UserError
from sdtrain.files import check_writable
from sdtrain.generation.drawing import Drawing, Request
from sdtrain.generation.generate import generate
from sdtrain.latent_diffusion import LatentDiffusion
from sdtrain.runs.layout import CheckpointFolder, PictureFolder
from sdtrain.runs.manifest import sha256_of


def sample(
    config: SampleConfig,
    model: LatentDiffusion,
    drawing: Drawing,
    image_size: int,
    *,
    untrained: Sequence[int] = (),
) -> int:
    """Draws what the configuration asks for, into its output folder, and counts the pictures.

    untrained: labels of which the run had no picture to train on.

    Raises UserError where the model cannot be asked so, StorageError where the folder cannot be
    written; then nothing was drawn.
    """
    conditioner = model.conditioner
    requests = requests_of(config, model.conditioner)
    for prompt in dict.fromkeys([*as_list(config.prompt), config.negative_prompt]):
        if model.conditioner.count_truncated([prompt]):
            warn(f"This prompt is cut, only its beginning is read: {prompt}")
    if "label" in conditioner.reads:
        for label in sorted({request.label for request in requests} & set(untrained)):
            called = Request(0, label=label).title(conditioner)
            warn(f"{called} had no picture to train on: what is drawn of it means nothing.")
    check_writable(Path(config.output))
    images = generate(model, requests, drawing, image_size)
    _write_samples(config, drawing, requests, images, conditioner)
    return len(images)


def _write_samples(
    config: SampleConfig,
    drawing: Drawing,
    requests: list[Request],
    images: Tensor,
    conditioner: Conditioner,
) -> None:
    """Writes a PNG of each image, which carries its request, the settings and the hash of the run's
    configuration, and one grid of all.

    images: [N, 3, H, W] in [-1, 1].
    """
    titles = [request.title(conditioner) for request in requests]
    folder = PictureFolder(Path(config.output))
    settings = {
        **drawing.settings,
        "ema": config.ema,
        "checkpoint": config.checkpoint,
        "config_sha256": sha256_of(CheckpointFolder(Path(config.checkpoint)).config),
    }
    for number, (request, image) in enumerate(zip(requests, images, strict=True)):
        path = folder.picture(number, request.seed)
        asked = _described(request, conditioner)
        pictures.write_png(pictures.picture(image), path, asked | settings)
    # A row for each prompt, as long as that is no long row.
    columns = config.num_images if 1 < config.num_images <= 8 else 4
    pictures.write_png(pictures.grid(images, titles, columns), folder.grid, settings)


def _described(request: Request, conditioner: Conditioner) -> dict[str, Any]:
    """A request as plain values: its seed, and of the condition what the model reads."""
    described: dict[str, Any] = {"seed": request.seed}
    if "caption" in conditioner.reads:
        described["prompt"] = request.prompt
        if request.negative_prompt:
            described["negative_prompt"] = request.negative_prompt
    if "label" in conditioner.reads:
        described["label"] = request.label
        if request.label < len(conditioner.class_names):
            described["class_name"] = conditioner.class_names[request.label]
    return described


def requests_of(config: SampleConfig, conditioner: Conditioner) -> list[Request]:
    """num_images pictures of each prompt or label, each with the seeds seed, seed + 1, ...

    Raises UserError where a condition that the model reads is missing or cannot be given, and where
    one is given that it does not read.
    """
    if "depth" in conditioner.reads:
        raise UserError(
            "This model reads a depth map for each picture, and sdtrain-sample can give it none",
            key="checkpoint",
            remedy="Draw it while it trains, where the data bring depth maps, or give another "
            "checkpoint.",
        )
    prompts = as_list(config.prompt)
    _check_prompts(config, prompts, conditioner.reads)
    labels = _labels(as_list(config.label), conditioner)
    requests = []
    for prompt in prompts or [""]:
        for label in labels or [0]:
            for seed in range(config.seed, config.seed + config.num_images):
                request = Request(
                    seed, prompt=prompt, negative_prompt=config.negative_prompt, label=label
                )
                requests.append(request)
    return requests


def _check_prompts(config: SampleConfig, prompts: list[str], reads: frozenset[str]) -> None:
    if "caption" not in reads and (prompts or config.negative_prompt):
        read = "no condition. Remove prompt"
        if "label" in reads:
            read = "a class label. Set label=NUMBER or label=NAME"
        raise UserError(f"prompt has no effect: this model reads {read}", key="prompt")
    if "caption" in reads and not prompts:
        raise UserError(
            "prompt is missing",
            key="prompt",
            remedy='Say what to draw with prompt="...", several times for several, or give '
            "prompt_file=FILE with one a line.",
        )
    if config.negative_prompt and config.guidance_scale == 1:
        raise UserError(
            "negative_prompt has no effect at guidance_scale=1, which asks the conditional "
            "network alone",
            key="negative_prompt",
            remedy="Raise guidance_scale.",
        )


def _labels(asked: list[int | str], conditioner: Conditioner) -> list[int]:
    """The numbers of the classes that are asked for by number or name. Raises UserError."""
    if "label" not in conditioner.reads:
        if asked:
            raise UserError(
                "label has no effect: this model was not trained with "
                "model/conditioner=class_label",
                key="label",
                remedy="Remove label.",
            )
        return []
    if not asked:
        raise UserError(
            "label is missing",
            key="label",
            remedy="Say which class to draw with label=NUMBER or label=[NUMBER,NUMBER]."
            + _known_classes(conditioner),
        )
    return [_label(label, conditioner) for label in asked]


def _label(asked: int | str, conditioner: Conditioner) -> int:
    """The number of one class. A name comes before a number: classes may be called by numbers."""
    names = list(conditioner.class_names)
    if str(asked) in names:
        return names.index(str(asked))
    if isinstance(asked, str) or any(name.isdecimal() for name in names):
        problem = "is the name of no class" if names else "is a name, and the classes have none"
        raise UserError(problem, key="label", value=asked, remedy=_known_classes(conditioner))
    known = conditioner.num_classes
    if asked < 0 or known is not None and asked >= known:
        must = "must be at least 0" if known is None else f"must lie between 0 and {known - 1}"
        raise UserError(must, key="label", value=asked, remedy=_known_classes(conditioner))
    return asked


def _known_classes(conditioner: Conditioner) -> str:
    """A sentence; "" where nothing is known of them."""
    names = [f"{label} {name}" for label, name in enumerate(conditioner.class_names)]
    if not names:
        known = conditioner.num_classes
        return "" if known is None else f" The classes are 0 to {known - 1}."
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return f" The classes are {', '.join(names[:20])}{more}."
