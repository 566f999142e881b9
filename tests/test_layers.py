"""A module imports only from lower lines; rooms on one line do not import each other."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sdtrain

PACKAGE = Path(sdtrain.__file__).parent

# From the top down. A room is a folder or a file of sdtrain/.
LINES = [
    {"cli"},
    {"callbacks", "report"},
    {"generate", "precompute"},  # compositions of a trained module
    {"module", "autoencoder_module"},
    {"diffusion", "samplers", "models", "conditioning", "data", "metrics"},
    {"schedules", "plots"},
    {"types", "tensors", "randomness", "pictures", "checkpoints", "optimisation"},
    {"paths"},
    {"errors", "redaction"},
]
HEIGHT = {room: len(LINES) - number for number, line in enumerate(LINES) for room in line}
# Denoisers and samplers are strangers: a sampler is given a function. So they are on one line, and both stand on schedules.
ALONE = {"schedules", "diffusion", "samplers"}  # these need torch alone


def room_of(dotted: str) -> str | None:
    """ "sdtrain.data.order" to "data"; None for the package itself and for what is not ours."""
    first, _, rest = dotted.partition(".")
    return rest.partition(".")[0] or None if first == "sdtrain" else None


def imported(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, wherever it stands: inside functions and `if TYPE_CHECKING` too. `from a import b` is a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            above = parts[: len(parts) - node.level + is_package] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)


def violations(sources: dict[str, str]) -> list[str]:
    """sources: path below the package -> text. One line for each import that goes up or sideways, or out of a room that is not on the list."""
    found = []
    for path, text in sources.items():
        parts = Path(path).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        module = ".".join(["sdtrain", *(parts[:-1] if is_package else parts)])
        here = room_of(module)
        for line, name in imported(ast.parse(text), module, is_package):
            there = room_of(name)
            if there is None or there == here or (here is not None and there == "__version__"):
                continue
            if (
                here is None
                or here not in HEIGHT
                or there not in HEIGHT
                or HEIGHT[there] >= HEIGHT[here]
            ):
                found.append(f"sdtrain/{path}:{line} imports {name}")
    return found


def sources() -> dict[str, str]:
    return {
        path.relative_to(PACKAGE).as_posix(): path.read_text()
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def test_imports_go_down():
    assert violations(sources()) == []


def test_every_room_has_its_line():
    rooms = {Path(path).parts[0].removesuffix(".py") for path in sources()} - {"__init__"}
    assert rooms <= HEIGHT.keys(), "a new room: give it a line above"


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("schedules/made_up.py", "import sdtrain.diffusion"),
        ("schedules/made_up.py", "from sdtrain.diffusion.forward import add_noise"),
        ("schedules/made_up.py", "from sdtrain import generate"),
        ("schedules/made_up.py", "from ..samplers import ddim"),
        ("schedules/__init__.py", "from .. import models"),
        ("schedules/made_up.py", "def f():\n    from sdtrain.cli import build"),
        (
            "schedules/made_up.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import sdtrain.training.diffusion_module as m",
        ),
        ("samplers/made_up.py", "from sdtrain.diffusion import Denoise"),  # sideways
        ("diffusion/made_up.py", "from sdtrain.samplers import ddim"),
        ("data/made_up.py", "from sdtrain.models.autoencoder import Pixels"),
        ("metrics/made_up.py", "from sdtrain.data.shapes import Shapes"),
        ("models/deep/made_up.py", "from ...conditioning import text"),
        ("module.py", "from sdtrain.training.autoencoder_module import psnr"),
        ("callbacks/made_up.py", "from sdtrain.assemble.model import build"),
        ("randomness.py", "from sdtrain.types import Batch"),
        ("paths.py", "from sdtrain.randomness import KeyedRandom"),
        ("errors.py", "from sdtrain.paths import shipped"),
        ("__init__.py", "from sdtrain.training.diffusion_module import DiffusionModule"),
        ("nowhere/made_up.py", "from sdtrain.errors import UserError"),
        ("cli/made_up.py", "import sdtrain.nowhere"),
    ],
)
def test_the_walker_sees_an_import_that_goes_up(path, text):
    assert [line.rpartition(":")[0] for line in violations({path: text})] == [f"sdtrain/{path}"]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (
            "cli/made_up.py",
            "import sdtrain.training.callbacks.ema, sdtrain.errors\nfrom sdtrain import __version__\nfrom sdtrain.assemble.model import build",
        ),
        (
            "callbacks/made_up.py",
            "from sdtrain.generation.generate import generate\nfrom sdtrain.training.diffusion_module import DiffusionModule\nfrom . import ema",
        ),
        (
            "diffusion/made_up.py",
            "from ..schedules import Schedule\nfrom .forward import add_noise\nimport sdtrainer",
        ),
        ("data/__init__.py", "from .order import permute\nfrom ..randomness import KeyedRandom"),
        ("paths.py", "from sdtrain.errors import UserError"),
    ],
)
def test_the_walker_lets_pass_what_goes_down(path, text):
    assert violations({path: text}) == []


def test_schedules_diffusion_and_samplers_need_torch_alone():
    """In a fresh process: what they bring in beside torch's own imports is sdtrain and the standard library."""
    code = (
        "import sys, torch\nbefore = set(sys.modules)\n"
        + "".join(f"import sdtrain.{room}\n" for room in sorted(ALONE))
        + "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))"
    )
    brought = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"lightning", "hydra", "diffusers", "transformers", "datasets"} & set(brought)
    assert set(brought) <= {"sdtrain", "torch"}
    assert "sdtrain" in brought
