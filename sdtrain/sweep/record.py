"""sweep.json: the command line of a sweep and the names of its arms. Needs no torch.

It is written when a sweep starts. The same command line finds the sweep by it later and resumes it.
"""

import contextlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from sdtrain.config.flags import flag_words, read_flags
from sdtrain.config.overrides import quoted, typed_values
from sdtrain.errors import UserError
from sdtrain.files import atomic_file, write_text
from sdtrain.redaction import redacted
from sdtrain.runs.layout import RunFolder, SweepFolder
from sdtrain.sweep.command_line import check_command_line

NOT_IDENTIFYING = re.compile(r"[+~]*hydra[./](launcher|sweep[.]dir)")
"""Overrides that only say where a sweep is stored and how its arms are started."""


def extra_sweep_overrides(arguments: list[str]) -> list[str]:
    """Return the overrides that a sweep needs in addition to the typed ones.

    These are its launcher and, if the same command line has started a sweep before, the folder of
    that sweep. Raises UserError for arguments that have no meaning in a sweep.
    """
    check_command_line(arguments)
    typed = typed_values(arguments)
    extra = []
    if "hydra/launcher" not in typed:
        _check_installed()
        extra.append("hydra/launcher=process")
    if "hydra.sweep.dir" not in typed:
        earlier = find_earlier_sweep(arguments)
        if earlier is not None:
            extra.append(f"hydra.sweep.dir={quoted(str(earlier))}")
    return extra


def _check_installed() -> None:
    """Raise UserError if Hydra would not find the launcher: an editable install of an earlier
    version lacks its folder.
    """
    try:
        found = importlib.util.find_spec("hydra_plugins.sdtrain_launcher")
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise UserError(
            "The sweep launcher is not installed",
            key="hydra/launcher",
            remedy="Install sdtrain again, for example with `pip install -e .`.",
        )


def find_earlier_sweep(arguments: Sequence[str]) -> Path | None:
    """Return the folder of the newest sweep under runs/ that the same command line started."""
    wanted = sweep_identity(redacted(list(arguments)))
    records = _find_records()
    for record in sorted(records, key=lambda path: path.stat().st_mtime, reverse=True):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            command = json.loads(record.read_text(encoding="utf-8"))["command"]
            if sweep_identity(command) == wanted:
                return record.parent.resolve()
    return None


def sweep_identity(arguments: Sequence[str]) -> list[str]:
    """Return the sorted arguments that decide what the sweep trains."""
    flags, words = read_flags(arguments)
    return sorted(word for word in flag_words(flags) + words if not NOT_IDENTIFYING.match(word))


def _find_records() -> list[Path]:
    """Return the records of the sweeps under runs/."""
    record = SweepFolder(Path()).record.name
    config = RunFolder(Path()).config.name
    found = []
    for folder, subfolders, files in os.walk("runs"):
        if record in files:
            found.append(SweepFolder(Path(folder)).record)
        if record in files or config in files:
            subfolders.clear()  # search neither the arms of a sweep nor the contents of a run
    return found


@contextlib.contextmanager
def record_sweep(folder: SweepFolder, arms: list[str]) -> Iterator[None]:
    """Write the record of a sweep, and restore the earlier state if the block raises.

    It is written before the block, so that the same command started a moment later finds this
    sweep. Arms of an earlier sweep in the same folder stay in the record. Raises UserError if the
    file in the folder is not a sweep's record.
    """
    path = folder.record
    earlier = path.read_bytes() if path.exists() else None
    names = [*_recorded_arms(path, earlier), *arms]
    record = {"command": redacted(sys.argv[1:]), "arms": list(dict.fromkeys(names))}
    write_text(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    try:
        yield
    except BaseException:
        if earlier is None:
            path.unlink()
        else:
            with atomic_file(path) as temporary:
                temporary.write_bytes(earlier)
        raise


def _recorded_arms(path: Path, record: bytes | None) -> list[str]:
    """Return the names of the arms in the bytes of a record, which were read from `path`."""
    if record is None:
        return []
    try:
        return list(map(str, json.loads(record)["arms"]))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not the record of a sweep",
            key="hydra.sweep.dir",
            remedy="Remove it, or choose another hydra.sweep.dir.",
        ) from error


def remove_traces(folder: SweepFolder) -> None:
    """Remove Hydra's own record, and the sweep's folder if it is empty: the sweep was refused."""
    with contextlib.suppress(OSError):
        folder.hydra_record.unlink()
    with contextlib.suppress(OSError):
        folder.path.rmdir()
