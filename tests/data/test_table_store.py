"""A stored table is read back as it was written, or not at all."""

import json
import os
import time

import pyarrow as pa

from sdtrain.data import table_store
from sdtrain.data.table_store import StoredTable, TableStore, remove_unused

NUMBERS = pa.table({"name": ["a", "é", "日本"], "captions": [["x"], ["y", "z"], [""]]})
FACTS = {"notes": ["ä line"], "count": 3}


def stored_in(folder):
    store = TableStore(folder)
    store.write("rows", StoredTable(NUMBERS, FACTS))
    return store


def test_it_is_read_back(tmp_path):
    stored = stored_in(tmp_path / "new" / "store").read("rows")
    assert stored.table.to_pydict() == NUMBERS.to_pydict()
    assert stored.facts == FACTS
    assert TableStore(tmp_path).read("rows") is None


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a flipped byte": lambda folder: flip(folder / "rows.arrow", 400),
    "cut short": lambda folder: os.truncate(folder / "rows.arrow", 100),
    "empty": lambda folder: os.truncate(folder / "rows.arrow", 0),
    "without its record": lambda folder: (folder / "rows.json").unlink(),
    "a record that is no json": lambda folder: (folder / "rows.json").write_bytes(b"\xff{"),
    "a record that is a list": lambda folder: (folder / "rows.json").write_text("[]"),
}


def test_a_damaged_table_is_not_read(tmp_path):
    for name, damage in DAMAGE.items():
        store = stored_in(tmp_path)
        damage(tmp_path)
        assert store.read("rows") is None, name
        assert stored_in(tmp_path).read("rows") is not None, name


def test_a_table_of_another_version_is_not_read(tmp_path):
    store = stored_in(tmp_path)
    record = tmp_path / "rows.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"version": 0}))
    assert store.read("rows") is None


def test_a_table_in_use_may_be_replaced(tmp_path):
    store = stored_in(tmp_path)
    first = store.read("rows")
    store.write("rows", StoredTable(pa.table({"name": ["other"] * 1000}), {}))
    assert first.table.to_pydict() == NUMBERS.to_pydict()
    assert len(store.read("rows").table) == 1000


def test_what_nobody_reads_is_removed(tmp_path):
    used = stored_in(tmp_path / "used")
    old = stored_in(tmp_path / "old")
    long_ago = time.time() - (table_store.UNUSED_DAYS + 1) * 24 * 3600
    for store in (used, old):
        os.utime(store.folder / "rows.json", (long_ago, long_ago))
    assert used.read("rows") is not None
    remove_unused(tmp_path)
    assert used.read("rows") is not None
    assert not list((tmp_path / "old").iterdir())


def test_what_a_dead_writer_left_is_removed(tmp_path):
    store = stored_in(tmp_path)
    (tmp_path / ".rows.arrow.123.tmp").write_bytes(b"half")
    with store.locked(lambda: None):
        assert not list(tmp_path.glob(".*.tmp"))
    assert store.read("rows") is not None
