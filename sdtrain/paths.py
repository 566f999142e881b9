"""The location of configs/ and data/, user paths and the import path.

configs/ and data/ are inside an installed package, and beside the package in a checkout.
"""

import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from sdtrain.errors import UserError

PACKAGE = Path(__file__).resolve().parent

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
"""An owner and a name: an id of the Hugging Face hub, unless there is a folder of that name."""


def shipped_folder(name: str, marker: str) -> Path:
    """Return the folder `name` that contains the file `marker`.

    Looks inside the package first, then beside it, as in a source checkout: a folder of that name
    beside an installed package may belong to another project.
    """
    for folder in (PACKAGE / f"_{name}", PACKAGE.parent / name):
        if (folder / marker).is_file():
            return folder
    raise UserError(
        f"sdtrain's own folder {name}/ is neither in nor beside {PACKAGE}: "
        "the installation is incomplete",
        remedy="Install sdtrain again.",
    )


def config_dir() -> Path:
    return shipped_folder("configs", "train.yaml")


def expand_home(path: str) -> str:
    """Replace ~ or ~user at the beginning of `path` by that user's home folder, as a shell does.

    If there is no such user, the path is returned as it is.
    """
    return os.path.expanduser(path)


def absolute_path(path: str, *, may_be_hub_id: bool) -> str:
    """Return a path from the root; an id of the Hugging Face hub as it is, unless it exists here.

    may_be_hub_id: whether such an id is allowed.
    """
    absolute = os.path.abspath(os.path.expanduser(path))
    if may_be_hub_id and HUB_ID.fullmatch(path) and not os.path.exists(absolute):
        return path
    return absolute


def cache_folder() -> Path:
    """Return sdtrain's folder in the user's cache, as XDG_CACHE_HOME says."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sdtrain"


def is_shipped(folder: Path) -> bool:
    """Whether a resolved folder belongs to sdtrain's own data."""
    return folder.is_relative_to(shipped_folder("data", "README.md").resolve())


def find_folder(path: str, key: str, parents: Iterable[Path] = (Path(),)) -> Path:
    """Return the folder `path` below the first of `parents` that has it.

    A path that begins with data/ may also be in sdtrain's own data. Raises UserError, which names
    `key`.
    """
    for parent in parents:
        if (parent / path).is_dir():
            return parent / path
    shipped = shipped_data(path)
    if shipped is not None:
        return shipped
    raise UserError(
        "does not exist or is not a folder",
        key=key,
        value=path,
        remedy=f"Set {key} to the path of a folder.",
    )


def shipped_data(path: str) -> Path | None:
    """Return the folder of sdtrain's own data that a path beginning with data/ names; None if there
    is none.
    """
    first, _, rest = path.partition("/")
    if first != "data" or not rest:
        return None
    shipped = shipped_folder("data", "README.md") / rest
    return shipped if shipped.is_dir() else None


def search_working_directory_last() -> None:
    """Let a user's modules in the working directory be imported, however the command was started.

    `python -m` would search that directory first, and import a file datasets.py there in place of
    the library.
    """
    directory = os.getcwd()
    spec = sys.modules["__main__"].__spec__
    is_our_module = spec is not None and spec.name.startswith("sdtrain.")
    if is_our_module and sys.path[0] == directory:
        del sys.path[0]
    if directory not in sys.path:
        sys.path.append(directory)
