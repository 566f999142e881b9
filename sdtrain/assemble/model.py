"""Build the model with its initial weights from the configuration, and check it with the data."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdtrain.adapters.interface import Adapter
from sdtrain.assemble.kept_files import SHA256
from sdtrain.assemble.objective import build_objective
from sdtrain.conditioning.channel_condition import ChannelCondition
from sdtrain.conditioning.interface import READABLE, Conditioner, Conditioning, Inputs
from sdtrain.config.build import build
from sdtrain.config.precheck import LOADER_KEYS
from sdtrain.config.pretrained import PRETRAINED_KEYS
from sdtrain.data.buckets import buckets_of
from sdtrain.errors import UserError, first_line, paragraph
from sdtrain.latent_diffusion import LatentDiffusion
from sdtrain.models.autoencoder import latent_shape_of
from sdtrain.models.modes import eval_mode
from sdtrain.paths import find_folder
from sdtrain.randomness import philox_key
from sdtrain.types import PictureData, PictureSize, captions_of, extras_of
from sdtrain.weight_files import FROZEN_DTYPES

NOT_ARGUMENTS = (*LOADER_KEYS, "cache", "sha256")
"""Keys of a data set's node that its constructor does not take."""

CLASSES_NAMED = 20
"""How many classes one line names at most."""


def data_arguments(node: dict) -> dict:
    """Return the `_target_` of a data set and the arguments of its constructor.

    Left out are the keys of the loader and of the cache, and the hash of the rows, which a saved
    configuration has.
    """
    return {name: value for name, value in node.items() if name not in NOT_ARGUMENTS}


def build_data(node: dict) -> PictureData:
    """Build the data set. It is told the batch size of the run if it asks for it."""
    return build(data_arguments(node), "data", batch_size=node.get("batch_size", 1))


def seed_weights(seed: int, purpose: str) -> None:
    """Seed torch's global generator for the initial weights of one part.

    They are keyed by purpose, so that a change of the unet does not change those of the text
    encoder.
    """
    torch.manual_seed(int(philox_key(seed, f"weights/{purpose}")[0] >> 1))


def build_autoencoder(cfg: dict, run_dir: Path) -> torch.nn.Module:
    """Build the frozen autoencoder, whose initial weights, if it has random ones, depend on `seed`.

    A relative path is searched for in the run's own folder first, where a first stage writes it.
    """
    seed_weights(cfg["seed"], "autoencoder")  # the user's own may start with random weights
    node = dict(cfg["model"]["autoencoder"])
    path = node.get("path")
    if isinstance(path, str):
        node["path"] = str(find_folder(path, "model.autoencoder.path", [run_dir, Path()]))
    return _build_part(node, "model.autoencoder")


def _build_part(node: dict, key: str, **more: Any) -> Any:
    """Build a part of the model. more: arguments beside those of the node.

    In a saved configuration the node also holds two hashes. That of the part's files is left out
    here, that of a frozen part's weights is passed to a constructor with a `sha256` argument.
    """
    arguments = dict(node)
    arguments.pop(SHA256, None)
    if "sha256" in arguments:
        more["sha256"] = arguments.pop("sha256")
    return build(arguments, key, **more)


def build_model(cfg: dict, run_dir: Path, data: PictureData | None = None) -> LatentDiffusion:
    """Build the model with its initial weights, which depend on `seed` alone.

    data: supplies the number and the names of the classes if the configuration does not.
    """
    model = cfg["model"]
    objective = build_objective(cfg)
    autoencoder = build_autoencoder(cfg, run_dir)
    parts = {"autoencoder": autoencoder} | _build_networks(cfg, data)
    not_arguments = (*parts, *PRETRAINED_KEYS)
    rest = {name: value for name, value in model.items() if name not in not_arguments}
    built = build(rest | parts, "model", objective=objective)
    if cfg.get("adapter"):
        seed_weights(cfg["seed"], "adapter")
        if getattr(built.unet, "added_channels", 0):
            raise UserError(
                "adds input channels to the UNet, whose weights are 0 and stay so with an adapter",
                key="model/channels",
                value=list(built.channels),
                remedy="Remove it, or choose a pipeline that reads this condition.",
            )
        dtype = model["frozen_dtype"]
        frozen_dtype = None if dtype is None else getattr(torch, FROZEN_DTYPES[dtype])
        built.attach(build_adapter(cfg["adapter"]), frozen_dtype)
    return built


def build_adapter(node: dict) -> Adapter:
    """Build the adapter. Raises UserError for anything else in its place."""
    adapter = build(node, "adapter")
    if not isinstance(adapter, Adapter):
        raise UserError(
            f"adapter is a {type(adapter).__name__}, not an Adapter",
            key="adapter",
            remedy="Name a subclass of sdtrain.adapters.interface.Adapter in its _target_.",
        )
    return adapter


def _build_networks(cfg: dict, data: PictureData | None) -> dict[str, Any]:
    """Build the conditioner, the channel conditions and the unet with their initial weights."""
    conditioner = build_conditioner(cfg, data)
    channels = build_channels(cfg)
    count = conditioner.channels + sum(each.channels for each in channels.values())
    seed_weights(cfg["seed"], "unet")
    unet = _build_part(cfg["model"]["unet"], "model.unet", condition_channels=count)
    return {"conditioner": conditioner, "channels": channels, "unet": unet}


def build_channels(cfg: dict) -> dict[str, ChannelCondition]:
    """Build the channel conditions by name. Raises UserError for anything else in their place."""
    channels = {}
    for name, node in (cfg["model"].get("channels") or {}).items():
        key = f"model.channels.{name}"
        if hasattr(torch.nn.ModuleDict, name):
            raise UserError(f"{key} has a name that torch uses", key=key, remedy="Rename it.")
        channels[name] = _build_part(node, key)
        check_part(channels[name], ChannelCondition, key)
    return channels


def build_conditioner(cfg: dict, data: PictureData | None) -> Conditioner:
    """Build the conditioner with its initial weights. data: as in `build_model`."""
    node = cfg["model"]["conditioner"]
    seed_weights(cfg["seed"], "conditioner")
    classes = {} if data is None else class_arguments(node, data)
    conditioner = _build_part(node, "model.conditioner", **classes)
    check_part(conditioner, Conditioner, "model.conditioner")
    return conditioner


def try_networks(cfg: dict, data: PictureData) -> None:
    """Build the conditioner and the unet to see that they can be built, and discard them.

    Raises UserError if they cannot, or if the data lack what the conditioner reads.
    """
    networks = _build_networks(cfg, data)
    check_condition(networks["conditioner"], data)
    check_channels(networks["channels"], data)


def class_arguments(node: dict, data: PictureData) -> dict[str, Any]:
    """Return the arguments about classes that a conditioner's node leaves to the data."""
    classes = extras_of(data).classes
    arguments = {}
    if node.get("num_classes", 0) is None:
        arguments["num_classes"] = data.num_classes
    fits = node.get("num_classes") in (None, data.num_classes)  # check_fit raises otherwise
    if fits and classes is not None and classes.names and node.get("class_names") is None:
        arguments["class_names"] = list(classes.names)
    return arguments


def check_part(part: object, base: type[Conditioner | ChannelCondition], key: str) -> None:
    """Raise UserError if a condition is no instance of `base`, or its `reads` has an unknown
    word.
    """
    if not isinstance(part, base):
        raise UserError(
            f"{key} is a {type(part).__name__}, not a {base.__name__}",
            key=key,
            remedy=f"Name a subclass of {base.__module__}.{base.__name__} in its _target_.",
        )
    unknown = sorted(str(word) for word in set(part.reads) - READABLE)
    if unknown:
        raise UserError(
            f"{key} has {', '.join(unknown)} in `reads`",
            key=key,
            allowed=", ".join(sorted(READABLE)),
        )


def check_condition(conditioner: Conditioner, data: PictureData) -> None:
    """Raise UserError if the data lack what the conditioner reads."""
    if "label" in conditioner.reads and data.num_classes < 2:
        classes = extras_of(data).classes
        why = f": {classes.why_none}" if classes and classes.why_none else ""
        raise UserError(
            f"model.conditioner reads class labels, which the data lack{why}",
            key="model.conditioner",
            remedy="Choose another model/conditioner, or give all pictures a label: for "
            "data=images a subfolder of each class, or a column label in metadata.jsonl or "
            "metadata.csv, for data=dataset the column data.columns.label.",
        )
    conditioner.check_data(data.num_classes)
    _check_depth(conditioner.reads, data, "model.conditioner")


def check_channels(channels: Mapping[str, ChannelCondition], data: PictureData) -> None:
    """Raise UserError if the data lack what a channel condition reads."""
    for name, condition in channels.items():
        key = f"model.channels.{name}"
        _check_depth(condition.reads, data, key)
        if "mask" in condition.reads and data.split("train")[(0, 0)].image is None:
            raise UserError(
                f"{key} masks the pictures themselves, of which a cache has the latents alone",
                key="data.cache",
                remedy="Set data.cache=off.",
            )


def _check_depth(reads: frozenset[str], data: PictureData, key: str) -> None:
    """Raise UserError if a condition reads depth maps, and the data have none or bad ones.

    key: of the condition.
    """
    if "depth" not in reads:
        return
    row = data.split("train")[(0, 0)]
    if row.depth is None:
        raise UserError(
            f"{key} reads depth maps, but the data have none",
            key=key,
            remedy="Set data.depth, data.depth_model or, with data=dataset, data.columns.depth, or "
            f"remove {key}.",
        )
    low, high = row.depth.aminmax()
    if not (low >= 0 and high <= 1):  # nor NaN
        raise UserError(
            f"gives depth maps with values from {low:g} to {high:g}; they must lie in [0, 1], "
            "1 nearest",
            key="data",
            value=type(data).__name__,
            remedy="Scale them where the data set makes them.",
        )
    if row.image is not None and row.depth.shape != (1, *row.image.shape[1:]):
        raise UserError(
            f"gives depth maps {tuple(row.depth.shape)} for pictures {tuple(row.image.shape)}; "
            "they must be [1, H, W] for [3, H, W]",
            key="data",
            value=type(data).__name__,
            remedy="Crop both alike where the data set makes them.",
        )


def check_fit(model: LatentDiffusion, data: PictureData) -> None:
    """Raise UserError if data, conditioner and unet do not fit together, before training starts."""
    check_condition(model.conditioner, data)
    check_channels(model.channels, data)
    check_network(model, data.image_size)
    buckets = buckets_of(data.split("train"))
    if buckets is not None:
        with _errors_name_bucket_step():
            width, height = buckets.sizes[-1]  # the least like a square; one, to save time
            check_network(model, (height, width))


def bucket_latent_shapes(
    model: LatentDiffusion, data: PictureData
) -> dict[tuple[int, int], tuple[int, int, int]]:
    """Return {(height, width): (C, h, w) of its latents} of each bucket; {} without buckets.

    Raises UserError, which names data.bucket_step, for sizes that the autoencoder cannot take.
    """
    buckets = buckets_of(data.split("train"))
    shapes = {}
    with _errors_name_bucket_step():
        for width, height in buckets.sizes if buckets else ():
            shapes[height, width] = latent_shape_of(model.autoencoder, (height, width))
    return shapes


@contextmanager
def _errors_name_bucket_step() -> Iterator[None]:
    """Let errors about the size of a picture name data.bucket_step, on which it depends."""
    try:
        yield
    except UserError as error:
        raise UserError(
            f"The model cannot take the pictures of a bucket: {paragraph(error)}",
            key="data.bucket_step",
            remedy="Set data.bucket_step to a multiple of what the autoencoder and the UNet divide "
            "the sides of a picture by.",
        ) from error


def check_network(model: LatentDiffusion, size: PictureSize) -> None:
    """Raise UserError if the networks cannot take pictures of this size.

    They are run once on two samples of zeros.
    """
    shape = latent_shape_of(model.autoencoder, size)
    inputs = empty_inputs(model, size)
    x = torch.zeros(2, *shape, device=model.device)
    with torch.no_grad(), eval_mode(model):
        conditioning = model.condition(inputs)
        try:
            output = model.network(conditioning)(x, torch.zeros(2, device=model.device))
        except Exception as error:  # the user's own network, or sizes that do not fit
            raise _unet_error(error, x, conditioning) from error
    if getattr(output, "shape", None) != x.shape:
        returned = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise UserError(
            f"model.unet must return a tensor of x's shape {list(x.shape)}; it returned {returned}",
            key="model.unet",
            remedy="Change model.unet.",
        )


def empty_inputs(model: LatentDiffusion, size: PictureSize) -> Inputs:
    """Return inputs for a trial run: two empty captions, labels 0, depth maps of zeros, and grey
    pictures that are masked everywhere.
    """
    height, width = (size, size) if isinstance(size, int) else size
    latent_size = latent_shape_of(model.autoencoder, size)[1:]
    depth = torch.zeros(2, 1, height, width, device=model.device)
    labels = torch.zeros(2, dtype=torch.long, device=model.device)
    masked = model.masked_pictures(depth.expand(-1, 3, -1, -1), torch.ones_like(depth))
    return Inputs(
        ["", ""], labels, labels.bool(), latent_size=latent_size, depth=depth, masked=masked
    )


def _unet_error(error: Exception, x: Tensor, conditioning: Conditioning) -> UserError:
    beside = ""
    if conditioning.channels is not None:
        beside = f" with {conditioning.channels.shape[1]} channels of a condition beside it"
    context = list(conditioning.context.shape)
    return UserError(
        f"model.unet cannot take x of shape {list(x.shape)}{beside}, timesteps of shape [2] and "
        f"context of shape {context} "
        f"({type(error).__name__}: {first_line(error)})",
        key="model.unet",
        remedy="Change model.unet, data.image_size or model.conditioner.context_dim.",
    )


def classes_line(model: LatentDiffusion, data: PictureData) -> str | None:
    """Return a line that names the classes and those without training pictures.

    None if the model does not read labels, or nothing is known about the classes.
    """
    classes = extras_of(data).classes
    if classes is None or "label" not in model.conditioner.reads:
        return None
    class_names = model.conditioner.class_names or [""] * classes.count
    names = [f"{label} {name}".rstrip() for label, name in enumerate(class_names)]
    line = f"{classes.count} classes: {', '.join(names[:CLASSES_NAMED])}"
    if len(names) > CLASSES_NAMED:
        line += f" and {len(names) - CLASSES_NAMED} more"
    if classes.untrained:
        untrained = ", ".join(names[label] for label in classes.untrained[:CLASSES_NAMED])
        line += (
            f". {len(classes.untrained)} of them have held-out pictures only and stay untrained: "
            f"{untrained}"
        )
    return f"{line}."


def truncated_captions_line(model: LatentDiffusion, data: PictureData) -> str | None:
    """Return a line that counts the captions that the conditioner truncates, or None if none is."""
    truncated, captions = _count_truncated(model.conditioner, data)
    if not truncated:
        return None
    limit = model.conditioner.max_tokens
    return (
        f"{truncated} of {captions} captions have more than "
        f"model.conditioner.max_length={limit} tokens: only their first {limit - 2} are read."
    )


def _count_truncated(conditioner: Conditioner, data: PictureData) -> tuple[int, int]:
    """Return how many training captions are truncated, and how many there are.

    The numbers are remembered if possible: a million captions take a minute.
    """
    memo = extras_of(data).memo
    key = conditioner.tokens_key
    remembered = memo.get(key) if memo and key else None
    if remembered is not None:
        return tuple(remembered)
    captions = captions_of(data.split("train"))
    counts = (conditioner.count_truncated(captions) if captions else 0, len(captions))
    if memo and key:
        memo.put(key, counts)
    return counts
