"""sweep.json: a sweep is found again by its words, and what is no sweep's stays as it is."""

import json
import subprocess
import sys

import pytest

from sdtrain.config.overrides import is_sweep, prepare_arguments, quoted
from sdtrain.errors import UserError
from sdtrain.runs.layout import SweepFolder
from sdtrain.sweep.record import (
    extra_sweep_overrides,
    find_earlier_sweep,
    record_sweep,
    sweep_identity,
)

WORDS = ["-m", "schedule=linear,cosine", "hydra.launcher.parallel=2"]


def write_record(folder, command, arms=()):
    folder.mkdir(parents=True, exist_ok=True)
    record = {"command": list(command), "arms": list(arms)}
    (folder / "sweep.json").write_text(json.dumps(record))


def test_a_sweep_is_found_again_by_its_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "shapes" / "then"
    write_record(folder, [*WORDS, "hydra/launcher=process", "hydra.sweep.dir=x"])
    assert find_earlier_sweep(WORDS) == folder
    assert find_earlier_sweep(["schedule=linear,cosine", "-m"]) == folder
    (tmp_path / "runs" / "a").mkdir()
    folder = folder.rename(tmp_path / "runs" / "a" / "b")  # a name may have slashes
    assert find_earlier_sweep(WORDS) == folder
    assert find_earlier_sweep([*WORDS, "seed=1"]) is None
    assert sweep_identity(WORDS) == ["--multirun", "schedule=linear,cosine"]
    (folder / "sweep.json").write_text("[")
    assert find_earlier_sweep(WORDS) is None


def test_what_a_sweep_is_given_beside_its_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert extra_sweep_overrides(WORDS) == ["hydra/launcher=process"]
    assert extra_sweep_overrides([*WORDS, "hydra/launcher=basic"]) == []
    folder = tmp_path / "runs" / "shapes" / "then"
    write_record(folder, WORDS)
    assert extra_sweep_overrides(WORDS) == [
        "hydra/launcher=process",
        f"hydra.sweep.dir={quoted(str(folder))}",
    ]
    assert extra_sweep_overrides([*WORDS, "hydra.sweep.dir=x"]) == ["hydra/launcher=process"]


def test_an_installation_without_the_launcher_is_named(monkeypatch):
    """As that of an editable checkout of an earlier version."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError) as raised:
        extra_sweep_overrides(WORDS)
    assert raised.value.key == "hydra/launcher"


def test_words_that_are_quoted_for_hydra_find_the_sweep_too(here, tmp_path):
    """Its arms cannot start, where files lie in the place of their folders."""
    words = ["logger=none", "seed=0,1", "name=a b"]
    folder = tmp_path / "runs" / "a b" / "then"
    write_record(folder, prepare_arguments(["-m", *words]), ["seed=0", "seed=1"])
    for seed in (0, 1):
        (folder / f"seed={seed}").touch()
    result = here("sdtrain", "-m", *words, cwd=tmp_path)
    assert result.code == 5, result.err
    assert f"sdtrain-report '{folder}'" in result.out


def test_a_refused_sweep_leaves_the_record_as_it_was(tmp_path):
    folder = SweepFolder(tmp_path)
    with pytest.raises(KeyboardInterrupt), record_sweep(folder, ["a"]):
        assert json.loads(folder.record.read_text())["arms"] == ["a"]
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    earlier = b'{"arms": ["b"],   "command": []}'
    folder.record.write_bytes(earlier)
    with pytest.raises(KeyboardInterrupt), record_sweep(folder, ["a"]):
        assert json.loads(folder.record.read_text())["arms"] == ["b", "a"]
        raise KeyboardInterrupt
    assert folder.record.read_bytes() == earlier
    assert list(tmp_path.iterdir()) == [folder.record]


@pytest.mark.parametrize("content", ['{"foo": 1}', "[", "[]", '{"arms": 3}'])
def test_a_file_that_is_no_record_is_left_alone(tmp_path, content):
    folder = SweepFolder(tmp_path)
    folder.record.write_text(content)
    with pytest.raises(UserError) as raised, record_sweep(folder, ["a"]):
        raise AssertionError
    assert raised.value.key == "hydra.sweep.dir"
    assert folder.record.read_text() == content


def test_sweep_none_is_no_sweep():
    assert is_sweep(["sweep=schedules"])
    for words in (["sweep=none"], ["sweep=null"], ["seed=1"]):
        assert not is_sweep(words)


def test_the_launcher_costs_no_import_of_torch():
    """Hydra imports it whenever one of its programs starts."""
    code = (
        "import sys, hydra_plugins\n"
        "from hydra.core.plugins import Plugins\n"
        "from hydra.plugins.launcher import Launcher\n"
        "print([each.__name__ for each in Plugins.instance().discover(Launcher)])\n"
        "print(hydra_plugins.__file__)\n"
        "print({'torch', 'lightning', 'sdtrain'} & set(sys.modules))\n"
    )
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    launchers, file, heavy = printed.splitlines()
    assert "'ProcessLauncher'" in launchers
    assert file == "None"  # a namespace, which other plugins share
    assert heavy == "set()"
