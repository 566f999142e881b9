"""Copies of the files that parts of the model read beside their weights, such as a tokenizer's.

A run keeps a copy and the hash of these files, and reads its copy if the originals are gone. A part
names the arguments that hold their paths in `kept_files`, see conditioning/interface.py.
"""

import contextlib
import copy
import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from sdtrain.config.check import import_target
from sdtrain.errors import UserError
from sdtrain.files import atomic_folder, sha256_of
from sdtrain.latent_diffusion import LatentDiffusion
from sdtrain.paths import find_folder, is_shipped
from sdtrain.runs.layout import RunFolder

SHA256 = "files_sha256"
"""Key under which a run's configuration stores the hash of a part's files."""

LARGEST_COPY = 64 * 2**20
"""Largest autoencoder, in bytes, of which a run keeps a copy. Of a larger one it records the path
and the hash alone."""


@dataclass(frozen=True)
class KeptFiles:
    """Files that one argument of a part of the model names.

    part, argument: names of the part and of its argument. path: as configured, a file or a folder.
    patterns: of the files that are read in a folder.
    """

    part: str
    argument: str
    path: str
    patterns: tuple[str, ...]

    @property
    def source(self) -> Path | None:
        """The original file or folder; None if it does not exist."""
        if Path(self.path).is_file():
            return Path(self.path)
        with contextlib.suppress(UserError):
            return find_folder(self.path, self.argument)
        return None

    def run_copy(self, run: RunFolder) -> Path | None:
        """Return the run's own copy of the file or folder; None if it has none."""
        folder = run.kept_files(self.part, self.argument)
        if not folder.is_dir():
            return None
        single_file = folder / Path(self.path).name
        return single_file if single_file.is_file() else folder

    def files(self, place: Path) -> list[Path]:
        """Return the files that are read at `place`, the original or a copy."""
        if place.is_file():
            return [place]
        matches: set[Path] = set()
        for pattern in self.patterns:
            matches.update(place.glob(pattern))
        return sorted(path for path in matches if path.is_file())


def kept_files(cfg: dict) -> Iterator[KeptFiles]:
    """Yield the kept files of all parts of a configured model."""
    for part in LatentDiffusion.PARTS:
        node = cfg["model"].get(part)
        if not isinstance(node, dict) or "_target_" not in node:
            continue
        patterns_of = getattr(import_target(node, f"model.{part}"), "kept_files", {})
        for argument, patterns in patterns_of.items():
            if isinstance(node.get(argument), str):
                yield KeptFiles(part, argument, node[argument], tuple(patterns))


def file_hashes(cfg: dict) -> dict[str, str]:
    """Return {part: sha256 of the names and contents of its files}, of parts that read any."""
    digests = {}
    for kept in kept_files(cfg):
        if kept.source is None:
            continue
        for path in kept.files(kept.source):
            digest = digests.setdefault(kept.part, hashlib.sha256())
            digest.update(f"{kept.argument} {path.name} {sha256_of(path)}\n".encode())
    return {part: digest.hexdigest() for part, digest in digests.items()}


def keep_files(cfg: dict, run: RunFolder) -> None:
    """Copy the files into the run, replacing an earlier copy. Raises OSError."""
    for kept in kept_files(cfg):
        if kept.source is None or kept.source == kept.run_copy(run):
            continue
        with atomic_folder(run.kept_files(kept.part, kept.argument)) as beside:
            for path in kept.files(kept.source):
                shutil.copyfile(path, beside / path.name)


def keep_autoencoder(autoencoder: nn.Module, run: RunFolder) -> None:
    """Copy an autoencoder of at most LARGEST_COPY bytes into the run. Raises OSError.

    Nothing is copied if it lies in the run already, or is shipped with sdtrain.
    """
    files = getattr(autoencoder, "files", [])
    if not files or sum(path.stat().st_size for path in files) > LARGEST_COPY:
        return
    folder = files[0].parent.resolve()
    if folder.is_relative_to(run.path.resolve()) or is_shipped(folder):
        return
    with atomic_folder(run.kept_files("autoencoder", "path")) as beside:
        for path in files:
            shutil.copyfile(path, beside / path.name)


def use_copies(cfg: dict, run: RunFolder, *, always: bool) -> dict:
    """Return the configuration with the paths of the run's copies in place of the originals.

    always: use the copies even if the originals exist.
    """
    changed = copy.deepcopy(cfg)
    for kept in kept_files(cfg):
        own = kept.run_copy(run)
        if own is not None and (always or kept.source is None):
            changed["model"][kept.part][kept.argument] = str(own)
    return changed


def check_files(cfg: dict) -> None:
    """Raise UserError if a part's files do not have the hash that the configuration records."""
    for part, digest in file_hashes(cfg).items():
        trained = cfg["model"][part].get(SHA256)
        if trained not in (None, digest):
            paths = []
            for kept in kept_files(cfg):
                if kept.part == part:
                    paths.append(f"{kept.argument}={kept.path}")
            raise UserError(
                f"model.{part} reads other files (sha256 {digest[:12]}) than the run was trained "
                f"with ({trained[:12]}): {', '.join(paths)}",
                key="checkpoint",
                remedy="Restore those files.",
            )
