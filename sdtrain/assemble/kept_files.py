"""Files that a part of the model reads beside its weights, as a tokenizer's: a run keeps a copy of
them and their hash, and reads its copy where the files have gone.

A part says which arguments name them in `kept_files`, see conditioning/interface.py.
"""

import contextlib
import copy
import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from sdtrain.config.check import target_of
from sdtrain.errors import UserError
from sdtrain.files import atomic_folder
from sdtrain.latent_diffusion import LatentDiffusion
from sdtrain.paths import find_folder, is_shipped
from sdtrain.runs.layout import RunFolder
from sdtrain.runs.manifest import sha256_of

SHA256 = "files_sha256"
"""Key of a part, in the configuration that a run writes: the hash of its files."""


SMALL = 64 * 2**20
"""Bytes of an autoencoder of which a run keeps a copy; a larger one is known by path and hash."""


@dataclass(frozen=True)
class KeptFiles:
    """part, argument: of the model. path: as configured. patterns: of the files that are read,
    where it is a folder.
    """

    part: str
    argument: str
    path: str
    patterns: tuple[str, ...]

    @property
    def source(self) -> Path | None:
        """The folder or file; None where it is not there."""
        if Path(self.path).is_file():
            return Path(self.path)
        with contextlib.suppress(UserError):
            return find_folder(self.path, self.argument)
        return None

    def copy_in(self, run: RunFolder) -> Path | None:
        """The run's own copy of the folder or file; None where there is none."""
        folder = run.kept(self.part, self.argument)
        if not folder.is_dir():
            return None
        single = folder / Path(self.path).name
        return single if single.is_file() else folder

    def files(self, place: Path) -> list[Path]:
        """Those that are read, at its source or its copy."""
        if place.is_file():
            return [place]
        found = set()
        for pattern in self.patterns:
            found |= {path for path in place.glob(pattern) if path.is_file()}
        return sorted(found)


def kept_files(cfg: dict) -> Iterator[KeptFiles]:
    """Of all parts of a configured model."""
    for part in LatentDiffusion.PARTS:
        node = cfg["model"].get(part)
        if not isinstance(node, dict) or "_target_" not in node:
            continue
        named = getattr(target_of(node, f"model.{part}"), "kept_files", {})
        for argument, patterns in named.items():
            if isinstance(node.get(argument), str):
                yield KeptFiles(part, argument, node[argument], tuple(patterns))


def file_hashes(cfg: dict) -> dict[str, str]:
    """{part: sha256 of the names and the bytes of its files}, of parts that read any."""
    lines: dict[str, list[str]] = {}
    for each in kept_files(cfg):
        if each.source is not None:
            for path in each.files(each.source):
                line = f"{each.argument} {path.name} {sha256_of(path)}\n"
                lines.setdefault(each.part, []).append(line)
    return {part: hashlib.sha256("".join(own).encode()).hexdigest() for part, own in lines.items()}


def keep_files(cfg: dict, run: RunFolder) -> None:
    """Copies them into the run, in the place of an earlier copy. Raises OSError."""
    for each in kept_files(cfg):
        if each.source is None or each.source == each.copy_in(run):
            continue
        with atomic_folder(run.kept(each.part, each.argument)) as beside:
            for path in each.files(each.source):
                shutil.copyfile(path, beside / path.name)


def keep_autoencoder(autoencoder: nn.Module, run: RunFolder) -> None:
    """Copies a small one into the run, unless it lies there, or travels with sdtrain. Raises
    OSError.
    """
    files = getattr(autoencoder, "files", [])
    if not files or sum(path.stat().st_size for path in files) > SMALL:
        return
    folder = files[0].parent.resolve()
    if folder.is_relative_to(run.path.resolve()) or is_shipped(folder):
        return
    with atomic_folder(run.kept("autoencoder", "path")) as beside:
        for path in files:
            shutil.copyfile(path, beside / path.name)


def reading_copies(cfg: dict, run: RunFolder, *, always: bool) -> dict:
    """The configuration with the run's copies in the place of the files, where it has any.

    always: also where the files themselves are there.
    """
    changed = copy.deepcopy(cfg)
    for each in kept_files(cfg):
        own = each.copy_in(run)
        if own is not None and (always or each.source is None):
            changed["model"][each.part][each.argument] = str(own)
    return changed


def check_files(cfg: dict) -> None:
    """Raises UserError where a part's files are not those whose hash the configuration has."""
    for part, digest in file_hashes(cfg).items():
        trained = cfg["model"][part].get(SHA256)
        if trained not in (None, digest):
            paths = [
                f"{each.argument}={each.path}" for each in kept_files(cfg) if each.part == part
            ]
            raise UserError(
                f"model.{part} reads other files (sha256 {digest[:12]}) than the run was trained "
                f"with ({trained[:12]}): {', '.join(paths)}",
                key="checkpoint",
                remedy="Restore those files.",
            )
