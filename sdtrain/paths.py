"""Where configs/ and data/ are: inside an installed package, beside it in a checkout. And what ~
stands for.
"""

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from sdtrain.errors import UserError

PACKAGE = Path(__file__).resolve().parent


def shipped(name: str, marker: str) -> Path:
    """The folder `name` that holds the file `marker`. Inside comes first: what lies beside an
    installed package may be anybody's.
    """
    for place in (PACKAGE / f"_{name}", PACKAGE.parent / name):
        if (place / marker).is_file():
            return place
    raise UserError(
        f"sdtrain's own folder {name}/ lies neither in nor beside {PACKAGE}: "
        "the installation is incomplete",
        remedy="Install sdtrain again.",
    )


def config_dir() -> Path:
    return shipped("configs", "train.yaml")


def expanded(path: str) -> str:
    """`path` with the home that a ~ or ~user at its beginning stands for, as in a shell: what is no
    user's stays as it is.
    """
    return os.path.expanduser(path)


def is_shipped(folder: Path) -> bool:
    """Whether a folder, resolved, belongs to sdtrain's own data."""
    return folder.is_relative_to(shipped("data", "README.md").resolve())


def find_folder(path: str, key: str, places: Iterable[Path] = (Path(),)) -> Path:
    """`path` as a folder below the first of `places` that has it; one that begins with data/ is
    also looked for in sdtrain's own data. UserError names `key`.
    """
    for place in places:
        if (place / path).is_dir():
            return place / path
    first, _, rest = path.partition("/")
    if first == "data" and rest and (own := shipped("data", "README.md") / rest).is_dir():
        return own
    raise UserError(
        "does not exist, or is no folder",
        key=key,
        value=path,
        remedy=f"Give the path of a folder in {key}.",
    )


def search_working_directory_last() -> None:
    """Lets a user's modules in the working directory be imported, however the command was started.

    `python -m` would search it first, and take a file datasets.py there for the library.
    """
    here = os.getcwd()
    spec = sys.modules["__main__"].__spec__
    if spec is not None and spec.name.startswith("sdtrain.") and sys.path[0] == here:
        del sys.path[0]
    if here not in sys.path:
        sys.path.append(here)
