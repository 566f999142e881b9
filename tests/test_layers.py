"""A module imports only from lower lines; rooms on one line do not import each other."""

import ast
import functools
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sdtrain

PACKAGE = Path(sdtrain.__file__).parent

README = (PACKAGE / "README.md").read_text(encoding="utf-8")

# From the top down. A room is a folder or a file of sdtrain/.
LINES = [
    {"commands"},
    {"sweep"},
    {"training"},
    {"export", "report", "audit"},
    {"assemble"},
    {"evaluation", "precompute"},
    {"generation"},
    {"config"},
    {"runs"},
    {"latent_diffusion"},
    {"adapters"},
    {"diffusion", "samplers", "models", "conditioning", "data"},
    {"schedules"},
    {"plots"},
    {"pictures"},
    {"fonts"},
    {"console"},
    {"files", "paths", "signals", "types", "randomness", "weight_files"},
    {"redaction", "errors"},
]
HEIGHT = {room: len(LINES) - number for number, line in enumerate(LINES) for room in line}
ALONE = {"schedules", "diffusion", "samplers"}  # these need torch alone


def room_of(dotted: str) -> str | None:
    """ "sdtrain.data.order" to "data"; None for the package itself and for what is not ours."""
    first, _, rest = dotted.partition(".")
    return rest.partition(".")[0] or None if first == "sdtrain" else None


def imported(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, wherever it stands: inside functions and `if
    TYPE_CHECKING` too. `from a import b` is a.b.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            above = parts[: len(parts) - node.level + is_package] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)


parsed = functools.cache(ast.parse)


def imports(sources: dict[str, str]) -> Iterator[tuple[str, str | None, str, str]]:
    """(place, room that imports, room that is imported, dotted name) of every import between rooms.

    sources: path below the package -> text. The room that imports is None for the package itself.
    """
    for path, text in sources.items():
        parts = Path(path).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        module = ".".join(["sdtrain", *(parts[:-1] if is_package else parts)])
        here = room_of(module)
        for line, name in imported(parsed(text), module, is_package):
            there = room_of(name)
            if there is None or there == here or (here is not None and there == "__version__"):
                continue
            yield f"sdtrain/{path}:{line}", here, there, name


def violations(sources: dict[str, str]) -> list[str]:
    """sources: path below the package -> text. One line for each import that goes up or sideways,
    or out of a room that is not on the list.
    """
    found = []
    for place, here, there, name in imports(sources):
        known = here in HEIGHT and there in HEIGHT
        if not known or HEIGHT[there] >= HEIGHT[here]:
            found.append(f"{place} imports {name}")
    return found


@functools.cache
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
        ("schedules/made_up.py", "from sdtrain import generation"),
        ("schedules/made_up.py", "from ..samplers import ddim"),
        ("schedules/__init__.py", "from .. import models"),
        ("schedules/made_up.py", "def f():\n    from sdtrain.config import build"),
        (
            "schedules/made_up.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import sdtrain.training as t",
        ),
        ("samplers/made_up.py", "from sdtrain.diffusion import Denoise"),  # sideways
        ("diffusion/made_up.py", "from sdtrain.samplers import ddim"),
        ("data/made_up.py", "from sdtrain.models.autoencoder import Pixels"),
        ("report/made_up.py", "from sdtrain.audit import orders"),
        ("evaluation/made_up.py", "from sdtrain.assemble.load import load"),
        ("models/deep/made_up.py", "from ...conditioning import text"),
        ("latent_diffusion.py", "from sdtrain.runs.layout import RunFolder"),
        ("training/callbacks/made_up.py", "from sdtrain.commands.train import task"),
        ("runs/made_up.py", "from sdtrain.config.check import suggest"),
        ("randomness.py", "from sdtrain.types import Batch"),
        ("paths.py", "from sdtrain.randomness import KeyedRandom"),
        ("errors.py", "from sdtrain.paths import shipped_folder"),
        ("__init__.py", "from sdtrain.latent_diffusion import LatentDiffusion"),
        ("nowhere/made_up.py", "from sdtrain.errors import UserError"),
        ("commands/made_up.py", "import sdtrain.nowhere"),
    ],
)
def test_the_walker_sees_an_import_that_goes_up(path, text):
    assert [line.rpartition(":")[0] for line in violations({path: text})] == [f"sdtrain/{path}"]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (
            "commands/made_up.py",
            "import sdtrain.training.run, sdtrain.errors\nfrom sdtrain import __version__\n"
            "from sdtrain.config.build import build",
        ),
        (
            "training/callbacks/made_up.py",
            "from sdtrain.generation.generate import generate\nfrom . import ema\n"
            "from sdtrain.training.progress import Progress",
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


FRESH = """
import importlib, json, sys, torch
for names in json.loads(sys.argv[1]):
    before = set(sys.modules)
    for name in names:
        importlib.import_module(name)
    brought = {name.partition(".")[0] for name in set(sys.modules) - before}
    print(*(brought - set(sys.stdlib_module_names)))
"""


def modules_of(room: str) -> list[str]:
    """The dotted names of a room's modules."""
    names = []
    for path in sorted((PACKAGE / room).rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        names.append(".".join(parts).removesuffix(".__init__"))
    return names


def modules_of_all(rooms: list[str]) -> list[str]:
    return list(itertools.chain.from_iterable(modules_of(room) for room in rooms))


@pytest.fixture(scope="module")
def brought() -> list[set[str]]:
    """The packages that a fresh process imports, beside torch's own: of the rooms that need torch
    alone, and then of the two that show numbers, and their commands."""
    shown = ["sdtrain.commands.report", "sdtrain.commands.schedule"]
    imported = [modules_of_all(sorted(ALONE)), modules_of_all(["report", "audit"]) + shown]
    command = [sys.executable, "-c", FRESH, json.dumps(imported)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return [set(line.split()) for line in result.stdout.splitlines()]


@pytest.mark.slow
def test_schedules_diffusion_and_samplers_need_torch_alone(brought):
    assert brought[0] <= {"sdtrain", "torch", "numpy"}
    assert "sdtrain" in brought[0]


@pytest.mark.slow
def test_report_and_audit_load_neither_lightning_nor_networks(brought):
    heavy = {"lightning", "diffusers", "transformers", "datasets", "wandb"}
    assert not heavy & (brought[0] | brought[1])
    assert {"sdtrain", "jinja2"} <= brought[0] | brought[1]


def test_report_and_audit_import_nothing_later_on():
    """Inside of a function it would not have been seen above."""
    for path, text in sources().items():
        if Path(path).parts[0] in ("report", "audit"):
            for function in functions(parsed(text)):
                inside = list(imported(function, "sdtrain", is_package=False))
                assert not inside, f"{path}: {function.name}"


# The house rules that a program can check: CONTRIBUTING.md has them.
LONGEST_FILE = 400
LONGEST_FUNCTION = 60
LONGEST_COMMAND = 60
MOST_POSITIONAL = 6


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def too_large(sources: dict[str, str]) -> list[str]:
    """One line for each file, function, command or list of arguments beyond the house rules."""
    found = []
    for path, text in sources.items():
        lines = text.count("\n")
        most = LONGEST_COMMAND if path.startswith("commands/") else LONGEST_FILE
        if lines > most:
            found.append(f"{path}: {lines} lines")
        for node in functions(parsed(text)):
            size = node.end_lineno - node.lineno + 1
            arguments = [each.arg for each in (*node.args.posonlyargs, *node.args.args)]
            arguments = [name for name in arguments if name not in ("self", "cls")]
            if size > LONGEST_FUNCTION:
                found.append(f"{path}: {node.name} has {size} lines")
            if len(arguments) > MOST_POSITIONAL:
                found.append(f"{path}: {node.name} has {len(arguments)} positional arguments")
    return found


def test_files_and_functions_are_small():
    assert too_large(sources()) == []


def test_what_is_too_large_is_seen():
    long_function = "def f(a, b, c, d, e, f, g):\n" + "    x = 1\n" * 60
    assert len(too_large({"data/made_up.py": long_function})) == 2
    assert len(too_large({"data/made_up.py": "x = 1\n" * 401})) == 1
    assert len(too_large({"commands/made_up.py": "x = 1\n" * 61})) == 1


def test_the_map_of_the_rooms_is_that_of_the_imports():
    """sdtrain/README.md lists the rooms line by line, from the top down, as they stand above."""
    drawn = []
    for line in re.findall(r"^\| \d+ \| (.+?) \|", README, flags=re.MULTILINE):
        drawn.append(
            {name.removesuffix(".py").strip("/") for name in re.findall(r"`([^`]+)`", line)}
        )
    assert drawn == LINES


# The diagram of the rooms

SMALL = set().union(*LINES[HEIGHT["commands"] - HEIGHT["plots"] :])
"""Single files at the bottom, which nearly every room imports: they are not drawn."""

Edge = tuple[str, str]


def reachable(room: str, edges: set[Edge]) -> set[str]:
    """The rooms to which a way of one edge or several leads."""
    found = set()
    waiting = [room]
    while waiting:
        start = waiting.pop()
        for above, below in edges:
            if above == start and below not in found:
                found.add(below)
                waiting.append(below)
    return found


def reduced(edges: set[Edge]) -> set[Edge]:
    """The transitive reduction: without the edges that a longer way stands for."""
    kept = set()
    for above, below in edges:
        others = {end for start, end in edges if start == above} - {below}
        if not any(below in reachable(other, edges) for other in others):
            kept.add((above, below))
    return kept


def edges_of_the_imports(sources: dict[str, str]) -> set[Edge]:
    edges = {(here, there) for _, here, there, _ in imports(sources)}
    return reduced({edge for edge in edges if not SMALL & set(edge)})


def drawn_edges(page: str) -> set[Edge]:
    """The arrows of a page's mermaid diagram: "a & b --> c --> d" are a to c, b to c and c to d."""
    diagram = re.search(r"```mermaid\n(.*?)```", page, flags=re.DOTALL)[1]
    edges = set()
    for line in diagram.splitlines():
        groups = [group.replace(" ", "").split("&") for group in line.split("-->")]
        for above, below in itertools.pairwise(groups):
            edges.update(itertools.product(above, below))
    return edges


def test_the_diagram_of_the_rooms_is_that_of_the_imports():
    """sdtrain/README.md draws every edge that is needed, and no other."""
    assert drawn_edges(README) == edges_of_the_imports(sources())


def test_a_diagram_with_another_edge_is_seen():
    """Its twin: an import that is not drawn, and an arrow without an import."""
    expected = edges_of_the_imports(sources())
    more = {"models/made_up.py": "from sdtrain.schedules import Schedule"}
    assert edges_of_the_imports(sources() | more) - expected == {("models", "schedules")}
    wrong = README.replace("flowchart TD\n", "flowchart TD\n    samplers --> models\n")
    assert drawn_edges(wrong) - expected == {("samplers", "models")}


def test_an_edge_that_a_longer_way_stands_for_is_left_out():
    made_up = {
        "training/made_up.py": "from sdtrain.config import build\nfrom sdtrain.runs import status",
        "config/made_up.py": "from sdtrain.runs import status\nfrom sdtrain import errors",
    }
    assert edges_of_the_imports(made_up) == {("training", "config"), ("config", "runs")}
    page = "```mermaid\nflowchart TD\n    a & b --> c --> d\n```"
    assert drawn_edges(page) == {("a", "c"), ("b", "c"), ("c", "d")}
