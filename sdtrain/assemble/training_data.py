"""The data set that a run was trained on, built again for evaluation."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from sdtrain.assemble.model import build_data, data_arguments
from sdtrain.config.bucket_step import BUCKET_KEYS
from sdtrain.config.check import Checker, import_target
from sdtrain.config.path_keys import is_path
from sdtrain.config.trusted import check_targets
from sdtrain.console import warn
from sdtrain.errors import UserError
from sdtrain.paths import HUB_ID
from sdtrain.runs.data_record import DataRecord
from sdtrain.types import PictureData, extras_of


def with_changes(arguments: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with changes; of a node, such as data.columns, only what is named."""
    changed = arguments | changes
    for name, value in changes.items():
        before = arguments.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            changed[name] = with_changes(before, value)
    return changed


class TrainingData:
    """Builds the data set on first access. Nothing is imported or read before.

    Args:
        node: the data set's node in the run's configuration.
        changes: arguments to change in it, such as the folder of pictures that have moved.
        allow: packages whose classes may be built.
        record: what the run recorded about its data; None for a run of an earlier version, whose
            relative paths are then taken from the working directory.
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
    def data_class(self) -> type:
        """Class of the data set. If a function creates it, it is built to find out."""
        check_targets(self.node, self.allow)
        target = import_target(self.node, "data")
        return target if isinstance(target, type) else type(self.data)

    @cached_property
    def data(self) -> PictureData:
        """The data set. Raises UserError if it cannot be built, say without its pictures."""
        self.was_used = True
        check_targets(self.node, self.allow)
        arguments = data_arguments(self.node)
        for name, value in arguments.items():
            if self.record and isinstance(value, str) and is_path(f"data.{name}"):
                path = self.record.resolve_path(value)
                if path.exists() or not HUB_ID.fullmatch(value):
                    arguments[name] = str(path)
        arguments = with_changes(arguments, self.changes)
        if self.node["_target_"].startswith("sdtrain."):
            self._drop_buckets(arguments)
        typed = {f"data.{name}" for name in self.changes}
        Checker(typed).call(arguments, "data", import_target(self.node, "data"))
        data = build_data(arguments)
        extras = extras_of(data)
        listings = [extras.sha256, extras.classes.sha256 if extras.classes else None]
        trained = self.node.get("sha256")
        if trained and any(listings) and trained not in listings:
            warn("The pictures or captions are not those that the run was trained on.")
        return data

    def _drop_buckets(self, arguments: dict[str, Any]) -> None:
        """Remove the keys about buckets: squares are measured. Raises UserError for a typed one."""
        for name in BUCKET_KEYS:
            if name in self.changes:
                raise UserError(
                    f"data.{name} has no effect: pictures are measured as squares",
                    key=f"data.{name}",
                    remedy="Remove it.",
                )
            arguments.pop(name, None)
