"""What sdtrain-schedule does: every combination that was named, side by side."""

import json

from rich.console import Console

from sdtrain.audit.entries import Entry, make_entries
from sdtrain.audit.plot import draw
from sdtrain.audit.request import AuditRequest
from sdtrain.audit.table import table
from sdtrain.files import check_writable, write_text
from sdtrain.pictures import write_png

NUMBERS = "schedules.json"
PICTURE = "schedules.png"


def audit(request: AuditRequest) -> None:
    """Writes the numbers and the picture, and prints the table.

    Raises UserError for a part that cannot be built, and at the end where every objective is
    refused; StorageError where the folder cannot be written.
    """
    entries = make_entries(request.combinations)
    folder = check_writable(request.output)
    write_text(folder / NUMBERS, _as_json(entries))
    write_png(draw(entries), folder / PICTURE)
    console = Console(markup=False, highlight=False)
    console.print(table(entries))
    for entry in entries:
        for note in entry.notes:
            console.print(f"{entry.name}: {note}", soft_wrap=True)
    if request.without_effect:
        keys = ", ".join(request.without_effect)
        console.print(f"No effect here, only on a run: {keys}.", soft_wrap=True)
    console.print(f"Written to {folder}: {PICTURE}, {NUMBERS}", soft_wrap=True)
    if all(entry.refusal for entry in entries):
        raise entries[0].refusal


def _as_json(entries: list[Entry]) -> str:
    text = json.dumps([entry.record() for entry in entries], indent=1)
    # An infinity is no JSON, but a number too large for a double is, and is read as one.
    return text.replace("Infinity", "1e999") + "\n"
