"""The newest sample pictures of each arm, with the same prompts and seeds."""

from PIL import Image

from sdtrain.pictures import read_notes, strip_of_rows
from sdtrain.report.compare import Arm
from sdtrain.report.record import MeasuredRun
from sdtrain.report.section import Picture, Section
from sdtrain.runs.layout import RunFolder

COLUMNS = 8
"""The largest number of pictures shown for each arm."""


def samples_section(arms: list[Arm]) -> Section:
    """Return a section with a row of pictures for each arm; it has no parts where none has any."""
    sheet, omitted = sample_sheet(arms)
    parts = []
    if sheet:
        parts.append(Picture("samples", sheet))
    if sheet and omitted:
        parts.append(
            "Not shown, because their last pictures are missing or have other prompts: "
            f"{'; '.join(omitted)}."
        )
    return Section("Samples with the same prompts and seeds", parts)


def sample_sheet(arms: list[Arm]) -> tuple[Image.Image | None, list[str]]:
    """Return (a sheet of pictures, the names of the arms that are not on it).

    The sheet shows the arms whose pictures have the prompts and seeds that most arms have; it is
    None where no arm has pictures.
    """
    newest = {arm.name: last_pictures(arm.runs_used[0]) for arm in arms}
    candidates = [requests for pictures, requests in newest.values() if pictures]
    common_requests = max(candidates, key=candidates.count, default=None)
    rows = []
    omitted = []
    for name, (pictures, requests) in newest.items():
        if pictures and requests == common_requests:
            rows.append((name, pictures[:COLUMNS]))
        else:
            omitted.append(name)
    if not rows:
        return None, omitted
    heads = []
    for request in common_requests[:COLUMNS]:
        heads.append(request["prompt"] or f"seed {request['seed']}")
    return strip_of_rows(rows, heads), omitted


def last_pictures(run: MeasuredRun) -> tuple[list[Image.Image], list[dict]]:
    """Return (pictures, requests) of the newest sheet of a run that can be read.

    A request is a dictionary with the "prompt" and the "seed" of a picture. Both lists are empty
    where there is no readable sheet.
    """
    pattern = RunFolder(run.folder).pictures("*")
    for path in sorted(pattern.parent.glob(pattern.name), reverse=True):
        try:
            sheet = Image.open(path)
            requests = read_notes(sheet)["requests"]
            side = sheet.width // len(requests)
            pictures = []
            for column in range(len(requests)):
                pictures.append(sheet.crop((column * side, 0, (column + 1) * side, sheet.height)))
            return pictures, requests
        except (OSError, KeyError, ValueError, TypeError, AttributeError, ZeroDivisionError):
            continue
    return [], []
