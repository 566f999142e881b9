"""Configuration to the model with its initial weights, and whether it fits the data."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdtrain.assemble.kept_files import SHA256
from sdtrain.assemble.objective import build_objective
from sdtrain.conditioning.interface import READABLE, Conditioner, Inputs
from sdtrain.config.build import build
from sdtrain.config.draft import LOADER_KEYS
from sdtrain.errors import UserError
from sdtrain.latent_diffusion import LatentDiffusion
from sdtrain.models.modes import eval_mode
from sdtrain.paths import find_folder
from sdtrain.randomness import philox_key
from sdtrain.types import PictureData, captions_of, extras_of

MOST_CLASSES = 20
"""That a line names."""


def data_arguments(node: dict) -> dict:
    """What a data set is built of; a saved configuration also holds the hash of its rows."""
    return {name: value for name, value in node.items() if name not in (*LOADER_KEYS, "sha256")}


def build_data(node: dict) -> PictureData:
    """The data set."""
    return build(data_arguments(node), "data")


def seed_weights(seed: int, purpose: str) -> None:
    """Initial weights are keyed by purpose: a change of the unet leaves the text encoder's as they
    were.
    """
    torch.manual_seed(int(philox_key(seed, f"weights/{purpose}")[0] >> 1))


def build_autoencoder(cfg: dict, run_dir: Path) -> torch.nn.Module:
    """The frozen autoencoder; a relative path is first looked for in the run's own folder, where a
    first stage leaves it.
    """
    node = dict(cfg["model"]["autoencoder"])
    path = node.get("path")
    if isinstance(path, str):
        node["path"] = str(find_folder(path, "model.autoencoder.path", [run_dir, Path()]))
    return _build_part(node, "model.autoencoder")


def _build_part(node: dict, key: str, **given: Any) -> Any:
    """A part of the model. A saved configuration also holds the hash of its files, and that of a
    frozen one's weights, which goes to a constructor that takes it.
    """
    arguments = {name: value for name, value in node.items() if name != SHA256}
    if "sha256" in arguments:
        given["sha256"] = arguments.pop("sha256")
    return build(arguments, key, **given)


def build_model(cfg: dict, run_dir: Path, data: PictureData | None = None) -> LatentDiffusion:
    """The model with its initial weights, which depend on `seed` alone.

    data: gives the number and the names of the classes where the configuration does not.
    """
    model = cfg["model"]
    objective = build_objective(cfg)
    seed_weights(cfg["seed"], "autoencoder")  # one of the user's own may have random weights
    autoencoder = build_autoencoder(cfg, run_dir)
    conditioner, unet = _networks(cfg, data)
    parts = {"autoencoder": autoencoder, "conditioner": conditioner, "unet": unet}
    rest = {name: value for name, value in model.items() if name not in parts}
    return build(rest | parts, "model", objective=objective)


def _networks(cfg: dict, data: PictureData | None) -> tuple[Conditioner, torch.nn.Module]:
    """Conditioner and unet with their initial weights."""
    model = cfg["model"]
    seed_weights(cfg["seed"], "conditioner")
    classes = {} if data is None else missing_classes(model["conditioner"], data)
    conditioner = _build_part(model["conditioner"], "model.conditioner", **classes)
    check_conditioner(conditioner)
    seed_weights(cfg["seed"], "unet")
    unet = _build_part(model["unet"], "model.unet", condition_channels=conditioner.channels)
    return conditioner, unet


def try_networks(cfg: dict, data: PictureData) -> None:
    """Raises UserError for a conditioner or a unet that cannot be built, or not with these data.
    They are thrown away.
    """
    conditioner, _ = _networks(cfg, data)
    check_condition(conditioner, data)


def missing_classes(node: dict, data: PictureData) -> dict[str, Any]:
    """What a conditioner's node leaves to the data."""
    classes = extras_of(data).classes
    missing = {}
    if node.get("num_classes", 0) is None:
        missing["num_classes"] = data.num_classes
    fits = node.get("num_classes") in (None, data.num_classes)  # else check_fit refuses it
    if fits and classes is not None and classes.names and node.get("class_names") is None:
        missing["class_names"] = list(classes.names)
    return missing


def check_conditioner(conditioner: object) -> None:
    """Raises UserError where it is no Conditioner, or says that it reads what there is not."""
    if not isinstance(conditioner, Conditioner):
        raise UserError(
            f"model.conditioner is a {type(conditioner).__name__}, and no Conditioner",
            key="model.conditioner",
            remedy="Name a subclass of sdtrain.conditioning.interface.Conditioner in its _target_.",
        )
    unknown = sorted(str(word) for word in set(conditioner.reads) - READABLE)
    if unknown:
        raise UserError(
            f"model.conditioner says that it reads {', '.join(unknown)}",
            key="model.conditioner",
            allowed=", ".join(sorted(READABLE)),
        )


def check_condition(conditioner: Conditioner, data: PictureData) -> None:
    """Raises UserError where the data do not bring what a conditioner reads."""
    if "label" in conditioner.reads and data.num_classes < 2:
        classes = extras_of(data).classes
        why = f": {classes.why_none}" if classes and classes.why_none else ""
        raise UserError(
            f"model.conditioner reads class labels, and the data have none{why}",
            key="model.conditioner",
            remedy="Choose another model/conditioner, or data with classes: of data=images "
            "a subfolder each, or a column label in metadata.jsonl or metadata.csv.",
        )
    conditioner.check_data(data.num_classes)
    if "depth" in conditioner.reads and data.split("train")[(0, 0)].depth is None:
        raise UserError(
            "model.conditioner reads depth maps, and the data have none",
            key="model.conditioner",
            remedy="Choose another model/conditioner, or data that bring them.",
        )


def check_fit(model: LatentDiffusion, data: PictureData) -> None:
    """Raises UserError where data, conditioner and unet do not fit together, before any time is
    spent.
    """
    check_condition(model.conditioner, data)
    shape = model.autoencoder.latent_shape(data.image_size)
    inputs = no_inputs(model, data.image_size)
    x = torch.zeros(2, *shape)
    with torch.no_grad(), eval_mode(model):
        conditioning = model.conditioner(inputs)
        try:
            output = model.network(conditioning)(x, torch.zeros(2))
        except Exception as error:  # the user's own network, or sizes that do not fit
            raise _misfit(error, x, conditioning) from error
    if getattr(output, "shape", None) != x.shape:
        is_tensor = isinstance(output, Tensor)
        returned = list(output.shape) if is_tensor else type(output).__name__
        raise UserError(
            f"model.unet must return a tensor of x's shape {list(x.shape)}; it returned {returned}",
            key="model.unet",
            remedy="Change model.unet.",
        )


def no_inputs(model: LatentDiffusion, image_size: int) -> Inputs:
    """Of two samples of nothing: what a model is tried on."""
    size = model.autoencoder.latent_shape(image_size)[1:]
    depth = torch.zeros(2, 1, image_size, image_size)
    nothing = torch.zeros(2, dtype=torch.long)
    return Inputs(["", ""], nothing, nothing.bool(), latent_size=size, depth=depth)


def _misfit(error: Exception, x: Tensor, conditioning) -> UserError:
    first_line = (str(error).splitlines() or [""])[0]
    channels = conditioning.channels
    beside = (
        f" with {channels.shape[1]} channels of a condition beside them"
        if channels is not None
        else ""
    )
    context = list(conditioning.context.shape)
    return UserError(
        f"model.unet cannot take x {list(x.shape)}{beside}, timestep [2] and context {context} "
        f"({type(error).__name__}: {first_line})",
        key="model.unet",
        remedy="Change model.unet, data.image_size or model.conditioner.context_dim.",
    )


def classes_line(model: LatentDiffusion, data: PictureData) -> str | None:
    """A line that says which classes are trained, where the model reads them and they have names or
    gaps.
    """
    classes = extras_of(data).classes
    if classes is None or "label" not in model.conditioner.reads:
        return None
    names = model.conditioner.class_names or [""] * classes.count
    called = [f"{label} {name}".rstrip() for label, name in enumerate(names)]
    line = f"{classes.count} classes: {', '.join(called[:MOST_CLASSES])}"
    if len(called) > MOST_CLASSES:
        line += f" and {len(called) - MOST_CLASSES} more"
    if classes.untrained:
        untrained = ", ".join(called[label] for label in classes.untrained[:MOST_CLASSES])
        line += (
            f". {len(classes.untrained)} of them have no picture but held-out ones, and stay "
            f"untrained: {untrained}"
        )
    return f"{line}."


def truncated_captions(model: LatentDiffusion, data: PictureData) -> str | None:
    """A line that counts the captions of which the conditioner reads only the beginning."""
    captions = captions_of(data.split("train"))
    if not captions:
        return None
    count = model.conditioner.count_truncated(captions)
    if not count:
        return None
    most = model.conditioner.max_tokens
    return (
        f"{count} of {len(captions)} captions have more than "
        f"model.conditioner.max_length={most} tokens: of those the first {most - 2} are read."
    )
