"""The data set that a run was trained on, made again for what is measured against it."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from sdtrain.assemble.model import build_data, data_arguments
from sdtrain.config.check import Checker, target_of
from sdtrain.config.overrides import is_free_text
from sdtrain.config.trusted import check_targets
from sdtrain.console import warn
from sdtrain.runs.data_record import DataRecord
from sdtrain.types import PictureData, extras_of


class TrainingData:
    """Gives the data set when it is first asked for, and nothing is imported or read before that.

    Args:
        node: of the run's configuration.
        changes: what differs from it, as the folder of pictures that have moved.
        allow: packages that may be built from.
        record: None of a run that an earlier version trained: its relative paths then begin here.
    """

    def __init__(
        self,
        node: dict[str, Any],
        changes: dict[str, Any],
        allow: Sequence[str],
        record: DataRecord | None,
    ) -> None:
        self.node = node
        self.changes = changes
        self.allow = allow
        self.record = record
        self.was_used = False

    @property
    def kind(self) -> type:
        """Its class; of one that a function makes, it is made to see."""
        check_targets(self.node, self.allow)
        target = target_of(self.node, "data")
        return target if isinstance(target, type) else type(self.data)

    @cached_property
    def data(self) -> PictureData:
        """Raises UserError where it cannot be made: its pictures are gone, say."""
        self.was_used = True
        check_targets(self.node, self.allow)
        arguments = data_arguments(self.node)
        for name, value in arguments.items():
            if self.record and isinstance(value, str) and is_free_text(f"data.{name}"):
                arguments[name] = str(self.record.resolved(value))
        arguments |= self.changes
        typed = {f"data.{name}" for name in self.changes}
        Checker(typed).call(arguments, "data", target_of(self.node, "data"))
        data = build_data(arguments)
        extras = extras_of(data)
        listings = [extras.sha256, extras.classes.sha256 if extras.classes else None]
        trained = self.node.get("sha256")
        if trained and any(listings) and trained not in listings:
            warn("The pictures or captions are not those that the run was trained on.")
        return data
