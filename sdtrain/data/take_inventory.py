"""Take the inventory of a folder, or read the one that an earlier start has stored.

Inventories are in the user's cache, one for each folder and each set of options that decide about
its rows. One process lists a folder; others that need it too wait, and then read what it stored.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import PIL

from sdtrain.console import warn
from sdtrain.data.folder_state import FolderState, now
from sdtrain.data.inventory import Inventory
from sdtrain.data.known_headers import KnownHeaders
from sdtrain.data.reader import Folder
from sdtrain.data.table_store import StoredTable, TableStore, remove_unused
from sdtrain.paths import cache_folder

HEADERS = "headers"
"""Name of the table of headers, which do not depend on any option."""


@dataclass(frozen=True)
class Taken:
    """An inventory that has just been taken, and the state in which the folder was before."""

    inventory: Inventory
    state: FolderState


def take_inventory(
    folder: str,
    options: Mapping[str, Any],
    list_folder: Callable[[KnownHeaders], Taken],
    *,
    refresh: bool,
) -> Inventory:
    """Return the inventory of a folder.

    Args:
        folder: its absolute path.
        options: what decides about the rows beside the folder, as values fit for json.
        list_folder: takes the inventory; given what reads the headers of the pictures.
        refresh: whether to do without anything that was stored before this call.
    """
    asked_at = now()
    store = TableStore(listings_folder() / _key(os.path.realpath(folder)))
    name = _key({"folder": folder, "pillow": PIL.__version__, **options})

    def say_that_it_waits() -> None:
        warn(f"Waiting for another process that is listing {folder}.")

    with store.locked(say_that_it_waits):
        stored = store.read(name)
        if stored is not None and _holds(stored, folder, asked_at if refresh else 0):
            return _with_memo(Inventory.from_stored(stored), store, name)
        known = KnownHeaders(Folder(folder), None if refresh else store.read(HEADERS))
        problem = None
        try:
            taken = list_folder(known)
        finally:
            # Also if a few pictures are refused: the others need not be read again.
            if known.has_new:
                problem = _store(store, HEADERS, known.to_stored())
        facts = {"state": asdict(taken.state), "made_at": now()}
        problem = problem or _store(store, name, taken.inventory.to_stored(facts))
        stored = store.read(name) if problem is None else None
        if stored is not None:
            remove_unused(listings_folder())
            return _with_memo(Inventory.from_stored(stored), store, name)
    problem = problem or f"{store.folder} does not keep what is written"
    note = f"The listing of {folder} is not stored, every start makes it again: {problem}."
    return replace(taken.inventory, notes=(*taken.inventory.notes, note))


def listings_folder() -> Path:
    """Return the folder of all stored inventories."""
    return cache_folder() / "listings"


def _with_memo(inventory: Inventory, store: TableStore, name: str) -> Inventory:
    return replace(inventory, memo=store.memo(name, inventory.sha256))


def _holds(stored: StoredTable, folder: str, since: int) -> bool:
    """Whether a stored inventory is not older than `since`, and its folder has not changed."""
    if stored.facts["made_at"] < since:
        return False
    return FolderState(**stored.facts["state"]).holds(folder)


def _store(store: TableStore, name: str, stored: StoredTable) -> str | None:
    """Write a table. Returns why it could not be written, or None."""
    try:
        store.write(name, stored)
    except OSError as error:
        return f"{store.folder} cannot be written ({error.strerror})"
    return None


def _key(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:24]
