"""Why a user's module cannot be imported is said to its end, and where such a module is found."""

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

from sdtrain.config.check import import_target
from sdtrain.config.importing import collector_off
from sdtrain.errors import UserError
from sdtrain.paths import PACKAGE
from sdtrain.training.child import SCRIPT

BROKEN = {
    "needs_a_library": ("import a_library_that_is_missing", ["'a_library_that_is_missing'"]),
    "is_no_python": ("class Net(:", ["SyntaxError", "line 1"]),
    "tells_more": (
        "try:\n    import missing_one\nexcept ImportError as error:\n"
        "    raise ImportError('install missing_one') from error",
        ["install missing_one", "because of ModuleNotFoundError", "line 2"],
    ),
    "fails": ("\n1 / 0", ["ZeroDivisionError: division by zero", "line 2"]),
    "has_another": ("Network = dict", ["AttributeError", "Did you mean 'Network'?"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_innermost_reason_is_said(tmp_path, monkeypatch, name):
    text, wanted = BROKEN[name]
    (tmp_path / f"broken_{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError) as refused:
        import_target({"_target_": f"broken_{name}.Networl"}, "model.unet")
    assert refused.value.key == "model.unet._target_"
    message = str(refused.value)
    for word in wanted:
        assert word in message
    assert (f"broken_{name}.py" in message) == (name != "has_another")


def test_a_module_that_is_not_there_has_no_line(tmp_path):
    with pytest.raises(UserError) as refused:
        import_target({"_target_": "not_there_at_all.Net"}, "model.unet")
    assert "No module named 'not_there_at_all'" in str(refused.value)
    assert "line" not in str(refused.value)


SHOWS = """
import sys, jinja2, own_network
sys.exit(f'{jinja2.__file__} {own_network.__file__}')
"""
SEARCHING = """
from sdtrain.paths import search_working_directory_last
search_working_directory_last()
import shows
"""


@pytest.mark.parametrize("started_as", ["installed command", "module"])
def test_a_module_in_the_working_directory_is_found_and_hides_no_other(tmp_path, started_as):
    """However Python is started: for a module it looks into the working directory first."""
    script = tmp_path / "bin" / "sdtrain-schedule"
    script.parent.mkdir()
    script.write_text(SEARCHING)
    for name in ("own_network", "jinja2"):
        (tmp_path / f"{name}.py").touch()
    (tmp_path / "shows.py").write_text(SHOWS)
    start = [str(script)]
    if started_as == "module":
        words = ["hydra.searchpath=[pkg://shows]"]
        start = ["-m", "sdtrain.commands.schedule", *words]
    ended = subprocess.run([sys.executable, *start], cwd=tmp_path, capture_output=True, text=True)
    jinja2, own_network = ended.stderr.split()
    assert Path(jinja2).parent != tmp_path
    assert Path(own_network).parent == tmp_path


def test_what_a_run_starts_is_hidden_nothing_from(tmp_path):
    """By files of the names of Python's own modules, which are imported before sdtrain is, and of
    libraries; and PYTHONPATH reaches it: its option of a user's package is found."""
    for name in ("types", "tokenize", "omegaconf", "train"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')")
    options = tmp_path / "elsewhere" / "own_configs" / "schedule"
    options.mkdir(parents=True)
    (options / "own.yaml").write_text("_target_: nowhere_at_all.Schedule")
    (options.parent / "__init__.py").touch()
    # Never an empty entry: Python reads it as the working directory.
    places = [str(PACKAGE.parent), str(tmp_path / "elsewhere")]
    words = ["hydra.searchpath=[pkg://own_configs]", "schedule=own", "seed=abc"]
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(places)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2, ended.stderr
    assert 'seed="abc"' in ended.stderr


class Ring:
    """Refers to itself, so that only the collector frees it."""

    def __init__(self):
        self.itself = self


def test_what_imports_have_made_is_not_searched_again_and_garbage_does_not_stay():
    before = Ring()
    garbage = weakref.ref(before)
    del before
    frozen = gc.get_freeze_count()
    with collector_off():
        assert not gc.isenabled()
        made = [Ring() for _ in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= frozen + len(made)
    assert garbage() is None
