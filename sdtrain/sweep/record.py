"""sweep.json: the words of a sweep and the names of its arms. Without torch.

It is written when a sweep begins, and found again when the same words are typed.
"""

import contextlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from sdtrain.config.flags import read_flags
from sdtrain.config.overrides import quoted, typed_values
from sdtrain.errors import UserError
from sdtrain.files import atomic_file, write_text
from sdtrain.redaction import redacted
from sdtrain.runs.layout import RunFolder, SweepFolder
from sdtrain.sweep.words import check_words

NO_CHANGE_OF_SWEEP = re.compile(r"[+~]*hydra[./](launcher|sweep[.]dir)")
"""Words that say where a sweep lies and how its arms are started, and not what it is."""


def sweep_folder(arguments: list[str]) -> list[str]:
    """The overrides that a sweep needs beside the words that were typed.

    They are its launcher, and its folder where it goes on with an earlier one.
    Raises UserError for words that a sweep cannot follow.
    """
    check_words(arguments)
    typed = typed_values(arguments)
    added = []
    if "hydra/launcher" not in typed:
        _check_installed()
        added.append("hydra/launcher=process")
    if "hydra.sweep.dir" not in typed:
        earlier = earlier_sweep(arguments)
        if earlier is not None:
            added.append(f"hydra.sweep.dir={quoted(str(earlier))}")
    return added


def _check_installed() -> None:
    """UserError where Hydra would not find the launcher: an editable install of an earlier version
    lacks its folder."""
    try:
        found = importlib.util.find_spec("hydra_plugins.sdtrain_launcher")
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise UserError(
            "The launcher of sweeps is not installed",
            key="hydra/launcher",
            remedy="Install sdtrain again, as with `pip install -e .`.",
        )


def earlier_sweep(words: Sequence[str]) -> Path | None:
    """The folder of the newest sweep under runs/ that the same words have begun."""
    wanted = sweep_identity(redacted(list(words)))
    records = [folder.record for folder in _sweeps_here()]
    for record in sorted(records, key=lambda path: path.stat().st_mtime, reverse=True):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            command = json.loads(record.read_text(encoding="utf-8"))["command"]
            if sweep_identity(command) == wanted:
                return record.parent.resolve()
    return None


def sweep_identity(words: Sequence[str]) -> list[str]:
    """The words that make a sweep what it is, in any order."""
    flags, setting = read_flags(words)
    every = [*(flag.word for flag in flags), *setting]
    return sorted(word for word in every if not NO_CHANGE_OF_SWEEP.match(word))


def _sweeps_here() -> list[SweepFolder]:
    """The sweeps under runs/."""
    record = SweepFolder(Path()).record.name
    config = RunFolder(Path()).config.name
    found = []
    for folder, below, files in os.walk("runs"):
        if record in files:
            found.append(SweepFolder(Path(folder)))
        if record in files or config in files:
            below.clear()  # neither a sweep's arms nor what a run holds
    return found


@contextlib.contextmanager
def recorded(folder: SweepFolder, arms: list[str]) -> Iterator[None]:
    """Writes the record, and takes it back if the block within raises.

    It is written at once, so that the same command finds this sweep a moment later. An earlier
    sweep's arms in the same folder stay in it. Raises UserError where the file is no record.
    """
    path = folder.record
    earlier = path.read_bytes() if path.exists() else None
    names = [*_arms_in(path, earlier), *arms]
    record = {"command": redacted(sys.argv[1:]), "arms": list(dict.fromkeys(names))}
    write_text(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    try:
        yield
    except BaseException:
        if earlier is None:
            path.unlink()
        else:
            with atomic_file(path) as beside:
                beside.write_bytes(earlier)
        raise


def _arms_in(path: Path, record: bytes | None) -> list[str]:
    if record is None:
        return []
    try:
        return [str(name) for name in json.loads(record)["arms"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no record of a sweep",
            key="hydra.sweep.dir",
            remedy="Remove it, or choose another hydra.sweep.dir.",
        ) from error


def remove_traces(folder: SweepFolder) -> None:
    """Removes Hydra's own record, and the folder where it is empty: the sweep was refused."""
    with contextlib.suppress(OSError):
        folder.hydra_record.unlink()
    with contextlib.suppress(OSError):
        folder.path.rmdir()
