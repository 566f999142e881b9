"""The inventory of a data set: what is known of all its pictures before any of them is read."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from sdtrain.data.table_store import Memo, StoredTable
from sdtrain.types import Classes

HELD_OUT = "held_out"
"""Column that says whether a row is held out for validation."""

PICTURE_STAMPS = {"bytes": pa.int64(), "changed_at": pa.int64()}
"""Columns of pictures that are files: the size, and the time of the last change in nanoseconds."""

CAPTION_STAMPS = {
    "caption_suffix": pa.int8(),
    "caption_bytes": pa.int64(),
    "caption_changed_at": pa.int64(),
}
"""Columns about the caption file beside a picture: which of CAPTION_SUFFIXES it has, its size and
time. Null if it has none, or if caption files are compared at every start.
"""


@dataclass(frozen=True)
class Inventory:
    """The usable pictures of a data set.

    Attributes:
        table: the rows, see `rows.rows_table`, with the column HELD_OUT and, if they are files in a
            folder, those of PICTURE_STAMPS and CAPTION_STAMPS.
        notes: lines for the user.
        sha256: hash of the rows.
        classes: what the labels mean.
        left_out: the number of pictures that are not usable.
        memo: remembers what later starts need not work out again; None if nothing does.
    """

    table: pa.Table
    notes: tuple[str, ...]
    sha256: str
    classes: Classes
    left_out: int
    memo: Memo | None = None

    @property
    def is_held_out(self) -> np.ndarray:
        """Whether each row is held out for validation, bool [N]."""
        return self.table.column(HELD_OUT).to_numpy()

    def without_hold_out(self) -> "Inventory":
        """Return the same one, of which no row is held out."""
        column = self.table.column_names.index(HELD_OUT)
        none = pa.array(np.zeros(len(self.table), dtype=bool))
        return replace(self, table=self.table.set_column(column, HELD_OUT, none))

    def to_stored(self, facts: dict[str, Any]) -> StoredTable:
        """Return it for a store, with further facts."""
        own = {
            "notes": self.notes,
            "sha256": self.sha256,
            "classes": asdict(self.classes),
            "left_out": self.left_out,
        }
        return StoredTable(self.table, facts | own)

    @classmethod
    def from_stored(cls, stored: StoredTable) -> "Inventory":
        """Return what `to_stored` was called on, without its memo."""
        facts = stored.facts
        classes = dict(facts["classes"])
        for name in ("names", "untrained"):
            classes[name] = tuple(classes[name])
        return cls(
            table=stored.table,
            notes=tuple(facts["notes"]),
            sha256=facts["sha256"],
            classes=Classes(**classes),
            left_out=facts["left_out"],
        )
