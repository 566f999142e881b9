"""The last pictures of each arm, under common seeds and prompts."""

from PIL import Image

from sdtrain.pictures import read_notes, strip_of_rows
from sdtrain.report.compare import Arm
from sdtrain.report.record import MeasuredRun
from sdtrain.report.section import Picture, Section
from sdtrain.runs.layout import RunFolder

COLUMNS = 8
"""Pictures of each arm."""


def drawn(arms: list[Arm]) -> Section:
    """A row of pictures for each arm; no parts where there are none."""
    sheet, without = sample_sheet(arms)
    parts = []
    if sheet:
        parts.append(Picture("samples", sheet))
    if sheet and without:
        parts.append(
            "Not shown, as their last pictures are missing or have other prompts: "
            f"{'; '.join(without)}."
        )
    return Section("Samples, with the same prompts and seeds", parts)


def sample_sheet(arms: list[Arm]) -> tuple[Image.Image | None, list[str]]:
    """(the pictures of the prompts that most arms have; the arms that have none, or others)."""
    found = {arm.name: last_pictures(arm.used[0]) for arm in arms}
    asked = [requests for pictures, requests in found.values() if pictures]
    prompts = max(asked, key=asked.count, default=None)
    rows = []
    without = []
    for name, (pictures, requests) in found.items():
        if pictures and requests == prompts:
            rows.append((name, pictures[:COLUMNS]))
        else:
            without.append(name)
    if not rows:
        return None, without
    heads = [each["prompt"] or f"seed {each['seed']}" for each in prompts[:COLUMNS]]
    return strip_of_rows(rows, heads), without


def last_pictures(run: MeasuredRun) -> tuple[list[Image.Image], list[dict]]:
    """The newest pictures of a run that can be read, and what each was asked for."""
    pattern = RunFolder(run.folder).pictures("*")
    for path in sorted(pattern.parent.glob(pattern.name), reverse=True):
        try:
            sheet = Image.open(path)
            asked = read_notes(sheet)["requests"]
            side = sheet.width // len(asked)
            pictures = []
            for place in range(len(asked)):
                pictures.append(sheet.crop((place * side, 0, (place + 1) * side, sheet.height)))
            return pictures, asked
        except (OSError, KeyError, ValueError, TypeError, AttributeError, ZeroDivisionError):
            continue
    return [], []
