"""The plan of a run: its checked, immutable configuration, before data or weights are loaded."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import torch

from sdtrain.assemble.drawing import build_drawing
from sdtrain.assemble.model import build_adapter
from sdtrain.assemble.objective import build_schedule, choose_weighting, inline_table
from sdtrain.config.build import build
from sdtrain.config.check import Checker
from sdtrain.config.precheck import LOADER_KEYS, PrecheckedConfig
from sdtrain.config.pretrained import PRETRAINED_KEYS, replaced_lines
from sdtrain.errors import UserError
from sdtrain.generation.drawing import Drawing
from sdtrain.training import optimisation
from sdtrain.training.callbacks.assembly import check_callbacks
from sdtrain.training.loggers.media import check_logger
from sdtrain.training.optimisation import Optimisation
from sdtrain.training.parameter_groups import TEXT_ENCODER_PREFIX, GroupSettings
from sdtrain.training.trainer import build_strategy

GROUP_KEYS = tuple(field.name for field in fields(GroupSettings))

READ_ELSEWHERE = {
    "data": (*LOADER_KEYS, "cache"),
    "model": tuple(PRETRAINED_KEYS),
    "optimizer": GROUP_KEYS,
}
"""{section: its keys that are not arguments of its target}."""


@dataclass(frozen=True)
class Plan:
    """What a run, or an arm of a sweep, is going to train. Immutable.

    prechecked: the user's settings, after the checks that need no model. notes: lines to print
    about keys that were adjusted to fit those typed on the command line. drawing: how samples are
    drawn during training; None for an autoencoder.
    """

    prechecked: PrecheckedConfig
    _config: dict = field(repr=False)
    notes: tuple[str, ...]
    drawing: Drawing | None

    @property
    def config(self) -> dict:
        """The configuration to train; a new copy each time."""
        return copy.deepcopy(self._config)

    def with_precision(self, precision: str) -> "Plan":
        """Return the same plan with another trainer.precision.

        Raises UserError if other settings do not fit it.
        """
        config = self.config
        config["trainer"]["precision"] = precision
        return replace(self, prechecked=self.prechecked.with_precision(precision), _config=config)

    def with_autoencoder(self, folder: Path) -> "Plan":
        """Return the same plan with the autoencoder of another folder, and without a first stage.

        Its latents are the means of their posteriors.
        """
        config = self.config
        config["first_stage"] = None
        config["model"]["autoencoder"] |= {"path": str(folder), "sample_posterior": False}
        return replace(self, _config=config)

    def optimisation(self) -> Optimisation:
        """Build a new Optimisation from the configuration."""
        trainer = self.prechecked.trainer
        node, groups = _split_optimizer(self._config["optimizer"])
        return Optimisation(
            optimizer=build(node, "optimizer"),
            groups=groups,
            lr_schedule=build(self._config["lr_schedule"], "lr_schedule"),
            max_images=trainer.max_images,
            gradient_clip=trainer.gradient_clip,
            max_skipped=trainer.max_skipped,
        )


def make_plan(prechecked: PrecheckedConfig) -> Plan:
    """Check all that needs torch but neither data nor weights, and return the plan.

    Raises UserError before anything is loaded or trained.
    """
    checker = Checker(prechecked.typed)
    config = _check_nodes(prechecked.config, checker)
    notes = [*checker.notes, *_fit_lr_schedule(config, prechecked)]
    drawing = None
    if not prechecked.trains_autoencoder:
        config["schedule"] = inline_table(config["schedule"])
        config["weighting"], note = choose_weighting(config, prechecked.typed)
        if note:
            notes.append(note)
        notes += replaced_lines(config)
        drawing = _check_drawings(config)
    plan = Plan(prechecked, config, tuple(notes), drawing)
    check_optimizer(config, partial(_try_optimizer, plan.optimisation()))
    build_strategy(config["strategy"])
    if config.get("adapter"):
        build_adapter(config["adapter"])
    check_callbacks(plan.config, drawing, prechecked.trainer)
    check_logger(config.get("logger"), prechecked.typed)
    return plan


def _split_optimizer(node: dict) -> tuple[dict, GroupSettings]:
    """Return the node of the optimizer itself, and the settings of its groups beside it."""
    own = {key: value for key, value in node.items() if key not in GROUP_KEYS}
    return own, GroupSettings(**{key: node[key] for key in GROUP_KEYS if key in node})


def _check_nodes(config: dict, checker: Checker) -> dict:
    """Check every node below the root against its constructor, and return the checked config."""
    checked = {}
    for name, node in config.items():
        others = READ_ELSEWHERE.get(name, ())
        if not others or not isinstance(node, dict):
            checked[name] = checker.node(node, name)
            continue
        own = {key: value for key, value in node.items() if key not in others}
        rest = {key: value for key, value in node.items() if key in others}
        if name == "optimizer":
            checker.call(rest, name, GroupSettings)
        checked[name] = checker.node(own, name, other_keys=others) | rest
    return checked


def _fit_lr_schedule(config: dict, prechecked: PrecheckedConfig) -> list[str]:
    """Shorten a cosine schedule's warm-up to a tenth of the run in `config`, unless the user typed
    its length.

    Returns lines to print about that, about a learning rate that will not reach its peak, and about
    a time limit that may end the run before its schedule.
    """
    node = config["lr_schedule"]
    trainer = prechecked.trainer
    name = node["_target_"].removeprefix(f"{optimisation.__name__}.")
    if name not in ("Constant", "Cosine"):
        return []  # a schedule of the user's
    notes = []
    tenth = trainer.max_images // 10
    warmup = node.get("warmup_images", 0)
    if name == "Cosine" and warmup > tenth and "lr_schedule.warmup_images" not in prechecked.typed:
        node["warmup_images"] = tenth
        notes.append(
            f"lr_schedule.warmup_images={tenth} is used instead of {warmup}: a tenth of "
            f"trainer.max_images={trainer.max_images}."
        )
    elif warmup > trainer.max_images:
        # Not shortened for a constant rate, which must not depend on the run's length: a run that
        # is extended later is the same as one that was that long from the start.
        notes.append(
            f"The learning rate reaches only {trainer.max_images / warmup:.1%} of optimizer.lr: "
            f"lr_schedule.warmup_images={warmup} is longer than "
            f"trainer.max_images={trainer.max_images}."
        )
    if name == "Cosine" and trainer.max_minutes is not None:
        notes.append(
            f"lr_schedule=cosine depends on images and not on time, so that a run can be repeated: "
            f"it reaches its end only if trainer.max_minutes={trainer.max_minutes:g} is enough "
            f"for trainer.max_images={trainer.max_images}."
        )
    return notes


def _check_drawings(config: dict) -> Drawing:
    """Build the drawing of the samples, and check those with other numbers of sampler steps."""
    schedule = build_schedule(config)
    samples = (config.get("callbacks") or {}).get("samples") or {}
    for steps in samples.get("sampler_steps", ()):
        try:
            build_drawing(config | {"steps": steps}, schedule)
        except UserError as error:
            raise error.with_prefix("callbacks.samples.sampler_steps") from error
    return build_drawing(config, schedule)


def _try_optimizer(optimisation: Optimisation) -> None:
    """Create the optimizer of a matrix and a bias that stand for a text encoder."""
    weight = f"{TEXT_ENCODER_PREFIX}weight"
    parameters = {
        weight: torch.nn.Parameter(torch.zeros(2, 2)),
        f"{TEXT_ENCODER_PREFIX}bias": torch.nn.Parameter(torch.zeros(2)),
    }
    optimisation.configure(parameters, {weight})


def check_optimizer(config: dict, create: Callable[[], object]) -> None:
    """Raise UserError for settings that the optimizer refuses. create: creates the optimizer."""
    try:
        create()
    except (ValueError, TypeError, RuntimeError) as error:
        # torch's messages end with the bad value, as in "Invalid learning rate: -1".
        last_word = str(error).split()[-1:]
        bad_keys = [key for key, value in config["optimizer"].items() if str(value) in last_word]
        key = f"optimizer.{bad_keys[0]}" if bad_keys else "optimizer"
        raise UserError(f"optimizer: {error}", key=key, remedy=f"Change {key}.") from error
