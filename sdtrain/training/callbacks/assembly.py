"""Builds the callbacks that a configuration names."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as L

from sdtrain.config.build import build
from sdtrain.config.schema import TrainerSettings
from sdtrain.generation.drawing import Drawing
from sdtrain.signals import Signals
from sdtrain.training.callbacks.ema import EMACallback
from sdtrain.training.callbacks.looks import Look
from sdtrain.training.callbacks.metrics_log import MetricsLog
from sdtrain.training.callbacks.validation import Validation
from sdtrain.types import PictureData


@dataclass
class CallbackSet:
    """The callbacks of a configuration.

    named: those under `callbacks`, by their names there, the average of the weights first.
    """

    metrics_log: MetricsLog
    named: dict[str, L.Callback] = field(default_factory=dict)
    validation: Validation | None = None

    @property
    def ema(self) -> EMACallback | None:
        return self.named.get("ema")

    @property
    def others(self) -> list[L.Callback]:
        """All callbacks but the average and the metrics log."""
        others = [callback for name, callback in self.named.items() if name != "ema"]
        if self.validation:
            others.append(self.validation)
        return others

    @property
    def looks(self) -> dict[str, Look]:
        """The callbacks that sample or validate, by name, in the order in which they run.

        The one with the largest weight is last, so that it gets what the others leave of their
        budget.
        """
        looks = {name: each for name, each in self.named.items() if isinstance(each, Look)}
        if self.validation:
            looks["validation"] = self.validation
        return dict(sorted(looks.items(), key=lambda item: item[1].weight))


def build_callbacks(
    config: dict,
    trainer: TrainerSettings,
    *,
    run_dir: Path,
    data: PictureData | None,
    drawing: Drawing | None,
    signals: Signals | None = None,
) -> CallbackSet:
    """Build the callbacks under `callbacks` and `validation`.

    Each gets those of the arguments "run_dir", "metrics_log", "data", "drawing", "ema" and
    "signals" that its constructor names.
    """
    built = CallbackSet(MetricsLog(every=trainer.log_every, run_dir=run_dir))
    arguments: dict[str, Any] = {
        "run_dir": run_dir,
        "metrics_log": built.metrics_log,
        "data": data,
        "drawing": drawing,
        "ema": None,
        "signals": signals,
    }
    nodes = {name: node for name, node in (config.get("callbacks") or {}).items() if node}
    # The average comes first, because the others use it.
    for name in sorted(nodes, key=lambda each: each != "ema"):
        built.named[name] = build(nodes[name], f"callbacks.{name}", **arguments)
        arguments["ema"] = built.ema
    if config.get("validation"):
        built.validation = build(config["validation"], "validation", **arguments)
    return built


def check_callbacks(config: dict, drawing: Drawing | None, trainer: TrainerSettings) -> None:
    """Raise UserError for settings that the constructors of sdtrain's own callbacks refuse.

    The user's own callbacks are not built yet, as they may need the data.
    """
    own_nodes = {}
    for name, node in (config.get("callbacks") or {}).items():
        if node and node["_target_"].startswith("sdtrain."):
            own_nodes[name] = node
    config = config | {"callbacks": own_nodes}
    build_callbacks(config, trainer, run_dir=Path(), data=None, drawing=drawing)
