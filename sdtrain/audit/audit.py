"""The work of sdtrain-schedule: show every named combination of choices side by side."""

import json

from rich.console import Console

from sdtrain.audit.entries import Entry, make_entries
from sdtrain.audit.plot import plot_entries
from sdtrain.audit.request import AuditRequest
from sdtrain.audit.table import entries_table
from sdtrain.files import check_writable, write_text
from sdtrain.pictures import write_png

NUMBERS = "schedules.json"
PICTURE = "schedules.png"


def write_audit(request: AuditRequest) -> None:
    """Write the numbers and the picture, and print the table.

    Raises UserError if a part cannot be built, and at the end if every objective was refused;
    StorageError if the folder cannot be written to.
    """
    entries = make_entries(request.combinations)
    folder = check_writable(request.output)
    write_text(folder / NUMBERS, _as_json(entries))
    write_png(plot_entries(entries), folder / PICTURE)
    console = Console(markup=False, highlight=False)
    console.print(entries_table(entries))
    for entry in entries:
        for note in entry.notes:
            console.print(f"{entry.name}: {note}", soft_wrap=True)
    if request.ignored_keys:
        keys = ", ".join(request.ignored_keys)
        console.print(f"No effect here, only on a run: {keys}.", soft_wrap=True)
    console.print(f"Written to {folder}: {PICTURE}, {NUMBERS}", soft_wrap=True)
    if all(entry.refusal for entry in entries):
        raise entries[0].refusal


def _as_json(entries: list[Entry]) -> str:
    text = json.dumps([entry.record() for entry in entries], indent=1)
    # JSON has no infinity, but a number too large for a double is valid and is read as infinity.
    return text.replace("Infinity", "1e999") + "\n"
