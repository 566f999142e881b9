"""Find a pipeline: a folder, a single file, or a repository of the Hugging Face hub.

Does not import torch, unless it has to convert a file.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sdtrain.errors import UserError, first_line
from sdtrain.models.pipeline_folder import (
    INDEX,
    KEY,
    SCHEDULER,
    STEMS,
    TOKENIZER,
    check_class,
    read_pipeline_folder,
)
from sdtrain.models.single_file import convert_single_file
from sdtrain.paths import HUB_ID, shipped_data
from sdtrain.weight_files import weight_file_name


def find_pipeline(source: str, revision: str | None, variant: str | None) -> Path:
    """Return the folder of a pipeline.

    One that is on the hub is downloaded and a single file is converted, unless it is cached.

    source: a folder, which may be one of sdtrain's own data (data/NAME), a safetensors file in the
    original layout, or a hub id OWNER/NAME. revision:
    branch, tag or commit on the hub. variant: whose weight files are downloaded. Raises UserError
    if there is none.
    """
    path = Path(source).expanduser()
    if not path.exists():
        path = shipped_data(source) or path
    if path.exists():
        options = {"model.revision": revision}
        if path.is_file():
            options["model.variant"] = variant
        for key, value in options.items():
            if value is not None:
                kind = "file" if path.is_file() else "folder"
                raise UserError(
                    f"has no effect: {KEY}={source} is a {kind}",
                    key=key,
                    value=value,
                    remedy="Remove it.",
                )
        return convert_single_file(path.absolute()) if path.is_file() else path.absolute()
    if not HUB_ID.fullmatch(source) or path.suffix == ".safetensors":
        raise UserError(
            "is neither a folder, a file nor an id of the Hugging Face hub (OWNER/NAME)",
            key=KEY,
            value=source,
            remedy=f"Set {KEY} to the folder of a pipeline in diffusers' layout, or to a "
            "safetensors file.",
        )
    return _snapshot(source, revision, variant)


def find_checkpoint_pipeline(path: Path) -> Path:
    """Return the folder of the pipeline that a command reads as its checkpoint.

    Raises UserError, which names `checkpoint`.
    """
    with errors_name_checkpoint(path):
        return find_pipeline(str(path), None, None)


@contextmanager
def errors_name_checkpoint(path: Path) -> Iterator[None]:
    """Raise every UserError of the block as one that names `checkpoint`, which is a pipeline."""
    try:
        yield
    except UserError as error:
        raise UserError(
            error.problem,
            key="checkpoint",
            value=str(path),
            remedy="Set checkpoint to the folder of a run, or to another pipeline.",
        ) from error


def _snapshot(source: str, revision: str | None, variant: str | None) -> Path:
    """Return the local copy of a repository of the hub. Raises UserError if it cannot be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [INDEX, f"{SCHEDULER}/*.json", f"{TOKENIZER}/*"]
    for subfolder, stem in STEMS.items():
        patterns.append(f"{subfolder}/config.json")
        patterns.append(f"{subfolder}/{weight_file_name(stem, variant)}")
        patterns.append(f"{subfolder}/{stem}*.safetensors.index*.json")
        patterns.append(f"{subfolder}/{stem}-*.safetensors")
        if variant is not None:
            patterns.append(f"{subfolder}/{stem}.{variant}-*.safetensors")

    def download(wanted: list[str], *, local: bool) -> Path:
        folder = snapshot_download(
            source, revision=revision, allow_patterns=wanted, local_files_only=local
        )
        return Path(folder)

    cached = None
    with suppress(LocalEntryNotFoundError):
        cached = download(patterns, local=True)
    if cached is not None and _is_complete(cached, variant):
        return cached
    try:
        check_class(download([INDEX], local=False), source)  # before gigabytes of another model
        return download(patterns, local=False)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        if cached is not None:
            return cached  # whose reader says what is missing
        at_revision = f" at model.revision={revision}" if revision else ""
        raise UserError(
            f"is not a folder, and cannot be read from the Hugging Face hub{at_revision}: "
            f"{first_line(error)}",
            key=KEY,
            value=source,
            remedy=f"Check {KEY} and model.revision, or set {KEY} to a folder.",
        ) from error


def _is_complete(folder: Path, variant: str | None) -> bool:
    """Whether the local copy of a repository holds a pipeline with all its files."""
    try:
        read_pipeline_folder(folder, str(folder), variant)
    except UserError:
        return False
    return True
