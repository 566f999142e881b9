"""The rows of a data set of real pictures: one Arrow table, of which a split shows a part.

Forked loader workers share the table without copying it, and one that is stored in a file is not
read before it is needed.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

COLUMNS = {
    "name": pa.large_string(),
    "captions": pa.large_list(pa.large_string()),
    "width": pa.int32(),
    "height": pa.int32(),
    "label": pa.int64(),
    "weight": pa.float64(),
}
"""Types of the columns. The large ones hold more than 2 GiB of text."""


class PictureRow(NamedTuple):
    """A picture of a split.

    captions: at least one, of which each visit reads one. size: (width, height) of the upright
    picture in its own pixels. weight: how often it is visited beside the others; None: as often.
    """

    name: str
    captions: Sequence[str]
    size: tuple[int, int]
    label: int = 0
    weight: float | None = None


def rows_table(rows: Sequence[PictureRow]) -> pa.Table:
    """Return the table of the rows, in their order."""
    values = {
        "name": [row.name for row in rows],
        "captions": [row.captions for row in rows],
        "width": [row.size[0] for row in rows],
        "height": [row.size[1] for row in rows],
        "label": [row.label for row in rows],
        "weight": [row.weight for row in rows],
    }
    columns = {name: pa.array(each, COLUMNS[name]) for name, each in values.items()}
    return pa.table(columns)


class Rows:
    """Some rows of a table, by their position among them.

    Args:
        table: see `rows_table`; further columns are ignored.
        indices: int64 [N], of the rows in the table.
    """

    def __init__(self, table: pa.Table, indices: np.ndarray) -> None:
        self.table = table.combine_chunks()
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> PictureRow:
        row = int(self.indices[index])
        values = {name: self.table.column(name).chunk(0)[row].as_py() for name in COLUMNS}
        size = (values["width"], values["height"])
        return PictureRow(
            values["name"], values["captions"], size, values["label"], values["weight"]
        )

    @property
    def names(self) -> list[str]:
        """Names, by index."""
        return self._column("name").to_pylist()

    @property
    def captions(self) -> list[str]:
        """All captions, ordered by index; those of one picture follow each other."""
        return pc.list_flatten(self._column("captions")).to_pylist()

    @property
    def caption_count(self) -> int:
        """The number of all captions."""
        return pc.sum(pc.list_value_length(self._column("captions"))).as_py()

    @property
    def labels(self) -> list[int]:
        """Labels, by index."""
        return self._column("label").to_pylist()

    @cached_property
    def sizes(self) -> np.ndarray:
        """(width, height), int32 [N, 2], by index."""
        width = self._column("width").to_numpy()
        height = self._column("height").to_numpy()
        return np.stack([width, height], axis=1)

    @cached_property
    def weights(self) -> np.ndarray | None:
        """Weights, float64 [N], by index, 1 where a row has none; None if no row has one."""
        if self.table.column("weight").null_count == len(self.table):
            return None
        weights = self._column("weight")
        if weights.null_count == len(weights):
            return None
        return pc.fill_null(weights, 1.0).to_numpy()

    @cached_property
    def distinct_names(self) -> int:
        """The number of different names: a picture may have several rows."""
        return pc.count_distinct(self._column("name")).as_py()

    def spread_captions(self, count: int) -> list[str]:
        """Return `count` captions spread evenly over the rows, each the first of its picture.

        Empty captions are used only if there are no others.
        """
        indices = self._indices_with_caption
        chosen = [indices[i * len(indices) // count] for i in range(count)]
        captions = self.table.column("captions").take(pa.array(chosen, pa.int64()))
        return pc.list_element(captions, 0).to_pylist()

    @cached_property
    def _indices_with_caption(self) -> np.ndarray:
        """Those of `indices` whose first caption is not empty, or all if there are none."""
        captions = self.table.column("captions").chunk(0)
        # The lengths alone: the captions of a million rows are not copied for it.
        lengths = pc.binary_length(captions.values).to_numpy()
        first = captions.offsets.to_numpy()[self.indices]
        with_caption = self.indices[lengths[first] > 0]
        return with_caption if len(with_caption) else self.indices

    def _column(self, name: str) -> pa.ChunkedArray:
        return self.table.column(name).take(pa.array(self.indices))
