"""Draw the pictures of a class that a run keeps training on (DreamBooth), with the model itself."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from sdtrain.errors import StorageError, UserError
from sdtrain.files import atomic_file
from sdtrain.generation.drawing import Drawing, Request
from sdtrain.generation.generate import generate
from sdtrain.latent_diffusion import LatentDiffusion
from sdtrain.pictures import to_image, write_png
from sdtrain.precompute.claims import Claims
from sdtrain.precompute.progress import progress_bar
from sdtrain.precompute.sharing import Batch, SharedWork

RECORD = ".drawn.json"
"""File that says what the pictures of the folder were drawn with; it marks a folder of sdtrain."""

COMPARED = ("prompt", "image_size", "model")
"""What must equal that of pictures drawn earlier. With another seed or sampler they will do."""

CLAIMS = ".claims.lock"

DRAWN_AT_ONCE = 16
"""How many pictures a process claims at a time."""


@dataclass(frozen=True)
class PriorRequest:
    """The pictures that are wanted.

    folder: for them. prompt: of all. count: their number. image_size: side in pixels. seed: of the
    first picture; each further one adds 1. drawn_with: what else they depend on, plain values.
    """

    folder: Path
    prompt: str
    count: int
    image_size: int
    seed: int
    drawn_with: dict[str, Any]

    @property
    def names(self) -> list[str]:
        """Names of the files, by number."""
        return [f"{number:06}.png" for number in range(self.count)]

    @property
    def record(self) -> dict[str, Any]:
        """What the folder says about its pictures."""
        return {
            "prompt": self.prompt,
            "image_size": self.image_size,
            "seed": self.seed,
            **self.drawn_with,
        }


def is_drawn_here(folder: Path) -> bool:
    """Whether the pictures of a folder are to be drawn: it has none, or those that were drawn."""
    if not folder.is_dir():
        return not folder.exists()
    return (folder / RECORD).is_file() or not any(folder.iterdir())


def is_complete(request: PriorRequest) -> bool:
    """Whether all pictures are there. Raises UserError if the folder holds those of another run."""
    record = request.folder / RECORD
    if not record.is_file():
        return False
    try:
        drawn = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"has a file {RECORD} that cannot be read: {error}",
            key="data.prior",
            value=str(request.folder),
            remedy="Set data.prior to a new folder.",
        ) from error
    for name in COMPARED:
        if drawn.get(name) != request.record[name]:
            raise UserError(
                f"holds pictures that were drawn with {name}={drawn.get(name)!r}, and this run "
                f"asks for {request.record[name]!r}",
                key="data.prior",
                value=str(request.folder),
                remedy="Set data.prior to a new folder.",
            )
    return all((request.folder / name).is_file() for name in request.names)


def draw_prior(
    request: PriorRequest,
    build: Callable[[], LatentDiffusion],
    drawing: Drawing,
    console: Console,
    check_signals: Callable[[], None],
) -> None:
    """Draw the pictures that are missing. Several processes share the work.

    Args:
        request: what is wanted.
        build: builds the model; called only if something is missing.
        drawing: how they are drawn.
        console: where a line and a bar are printed.
        check_signals: called before each evaluation of a network; raises to stop.

    Raises UserError if the folder holds pictures of another request, StorageError if it cannot be
    written.
    """
    if is_complete(request):
        return
    model = build()
    folder = request.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / RECORD) as temporary:
            temporary.write_text(json.dumps(request.record), encoding="utf-8")
        claims = Claims(folder / CLAIMS)
    except OSError as error:
        raise _not_writable(folder, error) from error

    def missing_in(batch: Batch) -> list[int]:
        return [number for number in batch.items if not (folder / names[number]).is_file()]

    names = request.names
    batches = []
    for start in range(0, request.count, DRAWN_AT_ONCE):
        numbers = range(start, min(start + DRAWN_AT_ONCE, request.count))
        batches.append(Batch(str(start), numbers))
    missing = sum(len(missing_in(batch)) for batch in batches)
    console.print(f"Prior: {missing} pictures are drawn now in {folder}.", soft_wrap=True)
    try:
        with progress_bar(console, missing, "pictures", "drawing") as bar:
            work = SharedWork(claims, batches, missing_in)
            while work.is_left:
                while batch := work.claim_next():
                    _draw(request, batch.items, model, drawing, check_signals)
                    work.note_computed(batch.name)
                    work.release_computed()
                    bar.advance(len(batch.items))
                work.wait_for_others(bar.wait(check_signals))
    finally:
        claims.close()


def _draw(
    request: PriorRequest,
    numbers: list[int],
    model: LatentDiffusion,
    drawing: Drawing,
    check_signals: Callable[[], None],
) -> None:
    """Draw and write the pictures of these numbers."""
    requests = [Request(request.seed + number, request.prompt) for number in numbers]
    images = generate(model, requests, drawing, request.image_size, on_evaluation=check_signals)
    for number, image in zip(numbers, images, strict=True):
        notes = {"seed": request.seed + number, "prompt": request.prompt}
        try:
            write_png(to_image(image), request.folder / request.names[number], notes)
        except OSError as error:
            raise _not_writable(request.folder, error) from error


def _not_writable(folder: Path, error: OSError) -> StorageError:
    return StorageError(
        f"The pictures of data.prior cannot be written to {folder}: {error.strerror}",
        key="data.prior",
        remedy="Free space, or set data.prior to another folder.",
    )
