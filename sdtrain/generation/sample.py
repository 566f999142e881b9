"""Draw and write the pictures of sdtrain-sample."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sdtrain import pictures
from sdtrain.conditioning.interface import Conditioner
from sdtrain.config.run_readers import as_list
from sdtrain.config.schema import SampleConfig
from sdtrain.console import warn
from sdtrain.errors import UserError
from sdtrain.files import (
    atomic_file,
    check_writable,
    missing_folders,
    remove_if_empty,
    sha256_of,
)
from sdtrain.generation.attention_maps import (
    WordMap,
    attention_sheet,
    check_attention,
    draw_with_attention,
)
from sdtrain.generation.depth_maps import estimate_depth_maps, pair, read_depth_maps
from sdtrain.generation.drawing import Drawing, GivenPictures, Request
from sdtrain.generation.generate import generate, starting_latents
from sdtrain.generation.sheets import shown_conditions, with_conditions
from sdtrain.generation.start_pictures import read_start_pictures
from sdtrain.latent_diffusion import LatentDiffusion
from sdtrain.runs.layout import PictureFolder
from sdtrain.types import PictureSize

NONE_GIVEN = GivenPictures()

MOST_WITH_ATTENTION = 16
"""Most pictures on the sheet of attention."""

LONGEST_ROW = 8
"""Most pictures of one prompt that are shown in one row of the grid."""


def sample(
    config: SampleConfig,
    model: LatentDiffusion,
    drawing: Drawing,
    image_size: PictureSize,
    *,
    config_file: Path,
    untrained: Sequence[int] = (),
) -> int:
    """Draw the requested pictures into the output folder and return their number.

    image_size: side or (height, width) of the pictures in pixels. config_file: the configuration of
    the model, whose hash the pictures carry. untrained: labels that had no training pictures.

    Before anything is drawn, raises UserError if the model does not take such a request, and
    StorageError if the folder cannot be written.
    """
    conditioner = model.conditioner
    _check_given(config, model)
    if config.attention:
        check_attention(model, "attention", True)
    requests = build_requests(config, conditioner)
    for prompt in dict.fromkeys([*as_list(config.prompt), config.negative_prompt]):
        if conditioner.count_truncated([prompt]):
            warn(f"This prompt is truncated, only its beginning is read: {prompt}")
    if "label" in conditioner.reads:
        for label in sorted({request.label for request in requests} & set(untrained)):
            name = Request(0, label=label).title(conditioner)
            warn(f"{name} had no training pictures: pictures of it are meaningless.")
    # A request that is refused only when its pictures have been read leaves no folder.
    with remove_if_empty(missing_folders(Path(config.output))):
        check_writable(Path(config.output))
        _check_inputs_stay(config)
        given = _read_given_pictures(config, model, image_size)
        requests = build_requests(config, conditioner, given)
        images, word_maps = _draw(config, model, requests, drawing, image_size)
        settings = _settings(config, model, drawing, image_size, config_file)
        _write_samples(config, requests, images, conditioner, settings)
        if word_maps:
            sheet = attention_sheet(images[: len(word_maps)], word_maps)
            pictures.write_png(sheet, PictureFolder(Path(config.output)).attention, settings)
        if config.save_latents:
            latents = starting_latents(model, requests, drawing, image_size).cpu()
            with atomic_file(PictureFolder(Path(config.output)).latents) as temporary:
                save_file({"latents": latents}, temporary)
    return len(images)


def _settings(
    config: SampleConfig,
    model: LatentDiffusion,
    drawing: Drawing,
    image_size: PictureSize,
    config_file: Path,
) -> dict[str, Any]:
    """Return what all pictures have in common, as plain values."""
    settings = {
        **drawing.settings,
        "image_size": image_size,
        "ema": config.ema,
        "checkpoint": config.checkpoint,
        "config_sha256": sha256_of(config_file),
    }
    if config.init_image is not None:
        settings["strength"] = drawing.strength
    if "depth" in model.reads and config.depth is None:
        settings["depth_model"] = config.depth_model
    for name in ("mask", "embedding", "lora", "lora_weight"):
        if getattr(config, name) is not None:
            settings[name] = getattr(config, name)
    return settings


def _draw(
    config: SampleConfig,
    model: LatentDiffusion,
    requests: list[Request],
    drawing: Drawing,
    image_size: PictureSize,
) -> tuple[Tensor, list[list[WordMap]]]:
    """Return the pictures [N, 3, H, W], and the word maps of the first ones if they are wanted."""
    if not config.attention:
        return generate(model, requests, drawing, image_size), []
    images, word_maps = draw_with_attention(
        model, requests[:MOST_WITH_ATTENTION], drawing, image_size
    )
    others = requests[MOST_WITH_ATTENTION:]
    if others:
        images = torch.cat([images, generate(model, others, drawing, image_size)])
    return images, word_maps


def _check_given(config: SampleConfig, model: LatentDiffusion) -> None:
    """Raise UserError if a depth map or a mask is missing, or a depth map has no effect."""
    if "mask" in model.reads and config.mask is None:
        raise UserError(
            "mask is missing: this model draws a masked part of a picture",
            key="mask",
            remedy="Set init_image=FILE and mask=FILE, white where it should be drawn anew.",
        )
    can_estimate = config.init_image is not None and config.depth_model is not None
    if "depth" in model.reads and config.depth is None and not can_estimate:
        raise UserError(
            "depth is missing: this model reads a depth map for each picture",
            key="depth",
            remedy="Set depth=FILE, a grey picture in which brighter is nearer, or a folder; or "
            "init_image=FILE and depth_model=MODEL, which estimates it.",
        )
    for key in ("depth", "depth_model"):
        if "depth" not in model.reads and getattr(config, key) is not None:
            raise UserError(
                "has no effect: this model reads no depth maps",
                key=key,
                value=getattr(config, key),
                remedy="Remove it.",
            )


def _read_given_pictures(
    config: SampleConfig, model: LatentDiffusion, image_size: PictureSize
) -> list[GivenPictures]:
    starts = []
    maps = []
    if config.init_image is not None:
        starts = read_start_pictures(config.init_image, config.mask, image_size, model)
    if config.depth is not None:
        maps = read_depth_maps(config.depth, image_size)
    elif "depth" in model.reads:
        maps = estimate_depth_maps(starts, config.depth_model, image_size, model.device)
    return pair(starts, maps)


def _check_inputs_stay(config: SampleConfig) -> None:
    """Raise UserError if the output folder holds a given picture, which could be replaced."""
    output = Path(config.output).resolve()
    for key in ("init_image", "mask", "depth"):
        typed = getattr(config, key)
        if typed is None:
            continue
        path = Path(typed).resolve()
        if output in (path, path.parent):
            raise UserError(
                f"is the folder of {key}={typed}, which could be replaced",
                key="output",
                value=config.output,
                remedy="Set output to another folder.",
            )


def _write_samples(
    config: SampleConfig,
    requests: list[Request],
    images: Tensor,
    conditioner: Conditioner,
    settings: dict[str, Any],
) -> None:
    """Write one PNG for each image, and a grid of all.

    Each PNG carries its request and the settings as metadata. images: [N, 3, H, W] in [-1, 1].
    """
    folder = PictureFolder(Path(config.output))
    for number, (request, image) in enumerate(zip(requests, images, strict=True)):
        path = folder.picture(number, request.seed)
        metadata = _request_metadata(request, conditioner) | settings
        pictures.write_png(pictures.to_image(image), path, metadata)
    titles = [request.title(conditioner) for request in requests]
    # One row for each prompt and given picture, unless it would be too long.
    columns = config.num_images
    given = len(shown_conditions(requests[0]))
    if columns <= LONGEST_ROW and given:
        images, titles = with_conditions(requests, images, titles, columns)
        columns += given
    elif not 1 < columns <= LONGEST_ROW:
        columns = 4
    pictures.write_png(pictures.grid(images, titles, columns), folder.grid, settings)


def _request_metadata(request: Request, conditioner: Conditioner) -> dict[str, Any]:
    """Return a request as plain values: its seed and the conditions that the model reads."""
    metadata: dict[str, Any] = {"seed": request.seed}
    if request.start is not None:
        metadata["init_image"] = str(request.start.file)
    if request.depth_file is not None:
        metadata["depth"] = str(request.depth_file)
    if "caption" in conditioner.reads:
        metadata["prompt"] = request.prompt
        if request.negative_prompt:
            metadata["negative_prompt"] = request.negative_prompt
    if "label" in conditioner.reads:
        metadata["label"] = request.label
        if request.label < len(conditioner.class_names):
            metadata["class_name"] = conditioner.class_names[request.label]
    return metadata


def build_requests(
    config: SampleConfig, conditioner: Conditioner, given: Sequence[GivenPictures] = (NONE_GIVEN,)
) -> list[Request]:
    """Return num_images requests for each prompt or label and each given picture, with the seeds
    seed, seed + 1, ...

    Raises UserError if a caption or label that the model reads is missing, or if one is given that
    it does not read.
    """
    prompts = as_list(config.prompt)
    _check_prompts(config, prompts, conditioner.reads)
    labels = _parse_labels(as_list(config.label), conditioner)
    requests = []
    for prompt in prompts or [""]:
        for label in labels or [0]:
            for each in given:
                for seed in range(config.seed, config.seed + config.num_images):
                    request = Request(
                        seed,
                        prompt=prompt,
                        negative_prompt=config.negative_prompt,
                        label=label,
                        depth=each.depth and each.depth.values,
                        start=each.start,
                        depth_file=each.depth and each.depth.file,
                    )
                    requests.append(request)
    return requests


def _check_prompts(config: SampleConfig, prompts: list[str], reads: frozenset[str]) -> None:
    """Raise UserError for a missing prompt, or one without effect.

    reads: what the model's conditioner reads.
    """
    if "caption" not in reads and (prompts or config.negative_prompt):
        condition = "no condition"
        remedy = "Remove prompt."
        if "label" in reads:
            condition = "a class label"
            remedy = "Set label=NUMBER or label=NAME."
        raise UserError(
            f"prompt has no effect: this model reads {condition}", key="prompt", remedy=remedy
        )
    if "caption" in reads and not prompts:
        raise UserError(
            "prompt is missing",
            key="prompt",
            remedy='Set prompt="..." (several times for several prompts), or prompt_file=FILE with '
            "one prompt per line.",
        )
    if config.negative_prompt and config.guidance_scale == 1:
        raise UserError(
            "negative_prompt has no effect at guidance_scale=1, which evaluates the network with "
            "the prompt alone",
            key="negative_prompt",
            remedy="Raise guidance_scale.",
        )


def _parse_labels(values: list[int | str], conditioner: Conditioner) -> list[int]:
    """Return the labels of classes given by number or name. Raises UserError."""
    if "label" not in conditioner.reads:
        if values:
            raise UserError(
                "label has no effect: this model was not trained with "
                "model/conditioner=class_label",
                key="label",
                remedy="Remove label.",
            )
        return []
    if not values:
        raise UserError(
            "label is missing",
            key="label",
            remedy="Set label=NUMBER or label=[NUMBER,NUMBER]." + _known_classes(conditioner),
        )
    return [_parse_label(value, conditioner) for value in values]


def _parse_label(value: int | str, conditioner: Conditioner) -> int:
    """Return the label of one class. Names take precedence, because a name may be a number."""
    names = list(conditioner.class_names)
    if str(value) in names:
        return names.index(str(value))
    if isinstance(value, str) or any(map(str.isdecimal, names)):
        problem = "is not the name of a class" if names else "is a name, but the classes have none"
        raise UserError(problem, key="label", value=value, remedy=_known_classes(conditioner))
    count = conditioner.num_classes
    if value < 0 or (count is not None and value >= count):
        problem = "must be at least 0"
        if count is not None:
            problem = f"must lie between 0 and {count - 1}"
        raise UserError(problem, key="label", value=value, remedy=_known_classes(conditioner))
    return value


def _known_classes(conditioner: Conditioner) -> str:
    """Return a sentence, after a space, that lists the classes; "" if they are not known."""
    names = [f"{label} {name}" for label, name in enumerate(conditioner.class_names)]
    if not names:
        count = conditioner.num_classes
        return "" if count is None else f" The classes are 0 to {count - 1}."
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return f" The classes are {', '.join(names[:20])}{more}."
