"""Configuration to the callbacks of a run, in the order in which they act."""

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
    """named: those under `callbacks`, by their names there, the average first."""

    metrics_log: MetricsLog
    named: dict[str, L.Callback] = field(default_factory=dict)
    validation: Validation | None = None

    @property
    def ema(self) -> EMACallback | None:
        return self.named.get("ema")

    @property
    def others(self) -> list[L.Callback]:
        """All but the average and the log of numbers."""
        found = [callback for name, callback in self.named.items() if name != "ema"]
        return found + ([self.validation] if self.validation else [])

    @property
    def looks(self) -> dict[str, Look]:
        """Those that look at the model, by their keys' last words: the largest part of their budget
        comes last, and has what the others leave.
        """
        found = {name: each for name, each in self.named.items() if isinstance(each, Look)}
        if self.validation:
            found["validation"] = self.validation
        return dict(sorted(found.items(), key=lambda item: item[1].weight))


def build_callbacks(
    config: dict,
    trainer: TrainerSettings,
    *,
    run_dir: Path,
    data: PictureData | None,
    drawing: Drawing | None,
    signals: Signals | None = None,
) -> CallbackSet:
    """What `callbacks` and `validation` name."""
    found = CallbackSet(MetricsLog(every=trainer.log_every, run_dir=run_dir))
    given: dict[str, Any] = {
        "run_dir": run_dir,
        "metrics_log": found.metrics_log,
        "data": data,
        "drawing": drawing,
        "ema": None,
        "signals": signals,
    }
    nodes = {name: node for name, node in (config.get("callbacks") or {}).items() if node}
    for name in sorted(nodes, key=lambda each: each != "ema"):  # the others use the average
        found.named[name] = build(nodes[name], f"callbacks.{name}", **given)
        given["ema"] = found.ema
    if config.get("validation"):
        found.validation = build(config["validation"], "validation", **given)
    return found


def try_callbacks(config: dict, drawing: Drawing | None, trainer: TrainerSettings) -> None:
    """Makes sdtrain's own callbacks, for what their constructors refuse. A user's may look at the
    data: it waits.
    """
    ours = {}
    for name, node in (config.get("callbacks") or {}).items():
        if node and node["_target_"].startswith("sdtrain."):
            ours[name] = node
    build_callbacks(
        config | {"callbacks": ours}, trainer, run_dir=Path(), data=None, drawing=drawing
    )
