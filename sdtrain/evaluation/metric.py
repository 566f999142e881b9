"""The interface of a metric.

A metric is one file with a subclass of Metric, and one yaml, configs/metric/NAME.yaml:

    # @package metrics.NAME
    _target_: my_package.my_module.MyMetric
    threshold: 0.5             # its own arguments, keyword-only in the constructor

`sdtrain-evaluate metrics=NAME` chooses it. Yaml files of your own lie in metric/ of a folder that
'hydra.searchpath=[file:///FOLDER]' names.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from PIL import Image

from sdtrain.evaluation.subject import Subject

CAPTIONS = "captions"
"""The model reads captions."""

REFERENCES = "references"
"""It compares with the pictures that the model was trained on: they have to be there."""


@dataclass
class Measurement:
    """What a metric has found.

    Args:
        columns: {column: {row: value}}, with the same rows in each column: the table as it is
            printed, and as it stands in evaluation.json.
        pictures: {name: picture}, written as METRIC-NAME.png, and as METRIC.png for the name "".
    """

    columns: dict[str, dict[str, float]]
    pictures: dict[str, Image.Image] = field(default_factory=dict)


class Metric:
    """One thing that can be measured of a trained model.

    A subclass overrides `measure`, and of the rest what differs from the defaults.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    """Of CAPTIONS and REFERENCES: a run that lacks one is refused before anything is drawn."""

    gives: ClassVar[frozenset[str]] = frozenset({"caption", "label"})
    """What of "caption", "label" and "depth" it draws pictures of: a model that reads more is
    refused."""

    unit: ClassVar[str] = ""
    """What the values count, as "share of the pictures"."""

    higher_is_better: ClassVar[bool | None] = None
    """None where neither is better."""

    own_steps: ClassVar[bool] = False
    """Whether it draws with numbers of steps of its own, and the command's `steps` is nothing to
    it."""

    def check(self, subject: Subject) -> None:
        """Raises UserError where it cannot measure this model. It is asked before any drawing."""

    def measure(self, subject: Subject) -> Measurement:
        """Draws what it needs, by `subject.samples` or `subject.draw`, and measures it."""
        raise NotImplementedError

    def format(self, value: float) -> str:
        """A value as it is printed."""
        return f"{value:.4g}"


def percent(value: float) -> str:
    """A share in [0, 1] as it is printed."""
    return f"{100 * value:.1f} %"
