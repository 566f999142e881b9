"""The interface of a metric.

A metric is one file with a subclass of Metric, and one yaml, configs/metric/NAME.yaml:

    # @package metrics.NAME
    _target_: my_package.my_module.MyMetric
    threshold: 0.5             # its own arguments, keyword-only in the constructor

`sdtrain-evaluate metrics=NAME` selects it. Your own yaml files belong into the subfolder metric/ of
a folder named by 'hydra.searchpath=[file:///FOLDER]'.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from PIL import Image

from sdtrain.evaluation.subject import Subject

CAPTIONS = "captions"
"""The metric needs a model that reads captions."""

REFERENCES = "references"
"""The metric needs the pictures that the model was trained on, to compare with."""


@dataclass
class Measurement:
    """The result of a metric.

    Args:
        columns: {column: {row: value}} with the same rows in each column, as printed and as
            written to evaluation.json.
        pictures: {name: picture}, written as METRIC-NAME.png, or as METRIC.png for the name "".
    """

    columns: dict[str, dict[str, float]]
    pictures: dict[str, Image.Image] = field(default_factory=dict)


class Metric:
    """A property of a trained model that can be measured.

    A subclass overrides `measure`, and whatever else differs from the defaults.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    """A subset of CAPTIONS and REFERENCES. A run that lacks one is an error before any drawing."""

    gives: ClassVar[frozenset[str]] = frozenset({"caption", "label"})
    """Which of "caption", "label" and "depth" its requests supply. A model that reads more is an
    error."""

    unit: ClassVar[str] = ""
    """Unit of the values, such as "share of the pictures"."""

    higher_is_better: ClassVar[bool | None] = None
    """Whether higher values are better; None if neither direction is."""

    own_steps: ClassVar[bool] = False
    """Whether it chooses the numbers of steps itself and ignores the command's `steps`."""

    def check(self, subject: Subject) -> None:
        """Raise UserError if this metric cannot measure the subject's model.

        Called before any picture is sampled.
        """

    def measure(self, subject: Subject) -> Measurement:
        """Draw pictures and return their numbers and sheets.

        `subject.samples` are those of `subject.requests`, which metrics share; `subject.draw` draws
        other requests.
        """
        raise NotImplementedError

    def format(self, value: float) -> str:
        """Return a value as printed in the table."""
        return f"{value:.4g}"


def percent(value: float) -> str:
    """Format a share in [0, 1]."""
    return f"{100 * value:.1f} %"
