"""Where the UNet looks for each word of a prompt: maps of its cross-attention.

As in Tang et al. 2023, "What the DAAM: Interpreting Stable Diffusion Using Cross Attention",
section 2.2, the attention probabilities of all heads, layers and steps are enlarged to one size and
averaged for each token. Unlike there, those of each head are first standardised over all places:
the attention to a token that has most of it everywhere, as that of the caption's beginning often
has, would hide where the others look.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers.models.attention_processor import Attention
from matplotlib import colormaps
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from sdtrain import pictures
from sdtrain.diffusion.guidance import CONDITIONED
from sdtrain.errors import UserError
from sdtrain.generation.drawing import Drawing, Request
from sdtrain.generation.generate import build_inputs, generate
from sdtrain.generation.image_to_image import remaining_times
from sdtrain.latent_diffusion import LatentDiffusion
from sdtrain.models.autoencoder import latent_shape_of
from sdtrain.models.modes import eval_mode
from sdtrain.types import PictureSize

COLOURS = colormaps["plasma"]

SMALLEST_DEVIATION = 1e-8
"""Of the attention of a head over the places, below which it counts as constant."""

OPACITY = 0.7
"""Of a map over its picture."""

WORD = re.compile(r"\w+(?:['’-]\w+)*")


@dataclass(frozen=True)
class WordMap:
    """Where the UNet looked for one word.

    word: as it stands in the prompt. attention: [H, W], the attention to the word in standard
    deviations from its mean over all places; the mean over tokens, heads, layers and steps.
    """

    word: str
    attention: Tensor


def draw_with_attention(
    model: LatentDiffusion,
    requests: list[Request],
    drawing: Drawing,
    image_size: PictureSize,
    *,
    on_evaluation: Callable[[], None] | None = None,
) -> tuple[Tensor, list[list[WordMap]]]:
    """Return pictures [N, 3, H, W], as `generate` does, and for each the maps of its words.

    The pictures are those of `generate`. After each step the network is evaluated once more, with
    the condition and without guidance, for its attention.

    At least one step of the sampler must be run. on_evaluation: as of `generate`.
    """
    images = []
    maps = []
    for start in range(0, len(requests), drawing.batch_size):
        batch = requests[start : start + drawing.batch_size]
        drawn, attention = _draw_batch(model, batch, drawing, image_size, on_evaluation)
        images.append(drawn)
        for request, each in zip(batch, attention, strict=True):
            maps.append(word_maps(model, request.prompt, each, drawn.shape[-2:]))
    return torch.cat(images), maps


def check_attention(model: LatentDiffusion, key: str, value: object) -> None:
    """Raise UserError, which names the key, unless the model reads captions by cross-attention."""
    if "caption" not in model.conditioner.reads or model.conditioner.tokenize is None:
        raise UserError(
            "has no effect: this model reads no captions",
            key=key,
            value=value,
            remedy="Remove it.",
        )
    if not cross_attentions(model.unet):
        raise UserError(
            f"finds no cross-attention in {type(model.unet).__name__}: it looks for the class "
            "Attention of diffusers",
            key=key,
            value=value,
            remedy="Remove it.",
        )


def cross_attentions(network: nn.Module) -> list[Attention]:
    """Return the cross-attention layers of a network."""
    layers = []
    for module in network.modules():
        if isinstance(module, Attention) and module.is_cross_attention:
            layers.append(module)
    return layers


def attention_sheet(images: Tensor, maps: list[list[WordMap]]) -> Image.Image:
    """Return a row for each picture: the picture, and over it the map of each word.

    Each map is scaled to its own range: dark blue where the network looked least, yellow where it
    looked most. images: [N, 3, H, W] in [-1, 1]. maps: of each picture.
    """
    longest = max(map(len, maps))
    shown = []
    titles = []
    for image, words in zip(images, maps, strict=True):
        row = [image, *(_overlaid(image, each.attention) for each in words)]
        names = ["", *(each.word for each in words)]
        blank = torch.ones_like(image)
        shown += row + [blank] * (1 + longest - len(row))
        titles += names + [""] * (1 + longest - len(names))
    return pictures.grid(torch.stack(shown), titles, columns=1 + longest)


def _overlaid(image: Tensor, attention: Tensor) -> Tensor:
    """Return a map in colours over a picture [3, H, W] that shines through."""
    spread = attention.max() - attention.min()
    scaled = (attention - attention.min()) / (spread if spread > 0 else 1)
    colours = torch.from_numpy(COLOURS(scaled.numpy())[..., :3]).permute(2, 0, 1).to(image)
    return (1 - OPACITY) * image + OPACITY * (2 * colours - 1)


def _draw_batch(
    model: LatentDiffusion,
    requests: list[Request],
    drawing: Drawing,
    image_size: PictureSize,
    on_evaluation: Callable[[], None] | None,
) -> tuple[Tensor, Tensor]:
    """Return the pictures [B, 3, H, W] and the mean attention [B, L, h, w] of one batch."""
    latent_size = latent_shape_of(model.autoencoder, image_size)[1:]
    schedule = model.objective.schedule
    grid = drawing.grid(drawing.steps, schedule)
    if requests[0].start is not None:
        grid = remaining_times(grid, drawing.strength)
    with torch.no_grad(), eval_mode(model):
        conditioning = model.condition(build_inputs(model, requests, latent_size)[CONDITIONED])
    denoiser = model.denoiser(conditioning)
    total = 0
    with recorded_attention(model.unet, latent_size) as recorded:

        def show(step: int, x: Tensor, x0: Tensor) -> None:
            nonlocal total
            recorded.clear()
            denoiser(x, grid[step])
            total = total + torch.stack(recorded).mean(0)
            recorded.clear()

        images = generate(model, requests, drawing, image_size, show, on_evaluation=on_evaluation)
    return images, (total / len(grid)).cpu()


@contextmanager
def recorded_attention(network: nn.Module, size: tuple[int, int]) -> Iterator[list[Tensor]]:
    """Record the attention of each cross-attention layer that is called in the block.

    Yields a list, to which every call appends the maps [B, L, h, w] of L tokens: their attention,
    standardised over all places, the mean over the heads, enlarged to `size`. The network's output
    does not change.

    Args:
        network: with layers of diffusers' class Attention.
        size: (h, w) of the latents.
    """
    recorded: list[Tensor] = []

    def record(layer: Attention, arguments: tuple, keywords: dict) -> None:
        hidden = arguments[0] if arguments else keywords["hidden_states"]
        context = keywords.get("encoder_hidden_states")
        if context is None:
            return
        recorded.append(_enlarged(_standardised(layer, hidden, context), size))

    handles = []
    for layer in cross_attentions(network):
        handles.append(layer.register_forward_pre_hook(record, with_kwargs=True))
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _standardised(layer: Attention, hidden: Tensor, context: Tensor) -> Tensor:
    """Return the attention [B, P, L] of P places to L tokens, the mean over the heads.

    That of each head has mean 0 and standard deviation 1 over the places; 0 if it is constant.

    hidden: [B, P, C]. context: [B, L, D].
    """
    query = layer.head_to_batch_dim(layer.to_q(hidden))
    key = layer.head_to_batch_dim(layer.to_k(context))
    scores = layer.get_attention_scores(query, key).float()
    deviations = scores - scores.mean(1, keepdim=True)
    scale = deviations.square().mean(1, keepdim=True).sqrt()
    standardised = deviations / scale.clamp(min=SMALLEST_DEVIATION)
    return standardised.unflatten(0, (len(hidden), -1)).mean(1)


def _enlarged(attention: Tensor, size: tuple[int, int]) -> Tensor:
    """Return attention [B, P, L] as maps [B, L, h, w] of the latents' size.

    The P places are those of the latents, halved until their number fits.
    """
    places = attention.shape[1]
    height, width = size
    while height * width > places:
        height = -(-height // 2)
        width = -(-width // 2)
    maps = attention.transpose(1, 2).unflatten(2, (height, width))
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def word_maps(
    model: LatentDiffusion, prompt: str, attention: Tensor, size: tuple[int, int]
) -> list[WordMap]:
    """Return the map of each word of a prompt that was not cut off, in their order.

    attention: [L, h, w] of each token. size: (H, W) of the picture.
    """
    tokenize = model.conditioner.tokenize
    encoded = tokenize.tokenizer(
        prompt,
        truncation=True,
        max_length=tokenize.max_length,
        return_offsets_mapping=True,
    )
    offsets = encoded["offset_mapping"]
    enlarged = F.interpolate(attention[None], size, mode="bilinear", align_corners=False)[0]
    maps: list[WordMap] = []
    for match in WORD.finditer(prompt):
        tokens = []
        for token, (start, end) in enumerate(offsets):
            if start < match.end() and end > match.start():
                tokens.append(token)
        if tokens:
            maps.append(WordMap(match.group(), enlarged[tokens].mean(0)))
    return maps
