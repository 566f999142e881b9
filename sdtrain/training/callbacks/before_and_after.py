"""Show the pictures of the unchanged model above those of the trained one."""

from collections.abc import Sequence

from PIL import Image

from sdtrain import pictures
from sdtrain.console import warn
from sdtrain.runs.layout import RunFolder


def before_and_after(
    run: RunFolder, seen: int, most: int, settings: Sequence[str]
) -> Image.Image | None:
    """Return the pictures of the unchanged model above those of now, from the same prompts and
    seeds.

    None if there are none, or if they differ because prompts or guidance were changed on a resume,
    of which it warns.

    Args:
        run: whose pictures are read.
        seen: the images seen now.
        most: pictures in a row.
        settings: the keys of the notes that must be the same.
    """
    before = notes_in(run, 0)
    after = notes_in(run, seen)
    if not before or not after:  # not drawn, or not written
        return None
    count = min(len(before["requests"]), len(after["requests"]), most)
    requests = before["requests"][:count]
    drawn_alike = all(before[key] == after[key] for key in settings)
    if not drawn_alike or requests != after["requests"][:count]:
        warn(
            "The pictures of the unchanged model are not shown beside those at the end: they have "
            "other prompts, seeds or sampler settings."
        )
        return None
    rows = [
        ("before training", _single_pictures(run, 0)[:count]),
        (f"after {seen} images", _single_pictures(run, seen)[:count]),
    ]
    return pictures.strip_of_rows(rows, [request["prompt"] for request in requests])


def notes_in(run: RunFolder, images_seen: int) -> dict[str, object] | None:
    """Return what the file of pictures at that number of images stores; None without one."""
    try:
        with Image.open(run.pictures(images_seen)) as row:
            return pictures.read_notes(row)
    except (OSError, ValueError, KeyError, AttributeError):  # or of another program
        return None


def _single_pictures(run: RunFolder, images_seen: int) -> list[Image.Image]:
    """Return the pictures that were drawn side by side."""
    with Image.open(run.pictures(images_seen)) as row:
        size = row.height
        return [row.crop((x, 0, x + size, size)) for x in range(0, row.width, size)]
