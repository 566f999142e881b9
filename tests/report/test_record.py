"""What a run has left behind: read whatever state it is in, and refused early."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from matplotlib.figure import Figure

from sdtrain.report import figures
from sdtrain.report.compare import compare, group_by_arm
from sdtrain.report.configuration import configuration_section, differing_keys
from sdtrain.report.cost import cost_section
from sdtrain.report.loss_difference import loss_difference_section
from sdtrain.report.objectives import build_objectives
from sdtrain.report.ranking import left_out_section, ranking_section, summary_lines
from sdtrain.runs.lock import hold_lock

LEFT_BEHIND = """
import pathlib, sys
from sdtrain.runs.lock import has_stale_lock
sys.exit(has_stale_lock(pathlib.Path(sys.argv[1])))
"""
WITHOUT_TORCH = """
import json, sys
from sdtrain.commands import report
for words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    try:
        report.main()
    except SystemExit as left:
        print(left.code, "torch" in sys.modules)
"""


def test_a_look_of_an_earlier_process_that_went_further_is_not_the_runs(write, errors, read):
    folder = write("a", errors(16, 1.0))
    (folder / "status.json").write_text(json.dumps({"state": "finished", "images_seen": 100}))
    (run,) = read(folder)
    assert run.last_validation.images_seen == 100


def test_a_look_of_another_shape_is_passed_over(write, errors, read):
    sweep = write("a", errors(16, 1.0)).parent
    path = write("b", errors(16, 1.2), config={"x": 1}) / "validation" / "000000000200.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pictures": ["one"]}))
    assert [len(run.validations) for run in read(sweep)] == [2, 1]


def test_runs_of_one_name_are_told_apart(write, errors, read, tmp_path):
    for place in ("one", "other"):
        shutil.copytree(write(f"run-{place}", errors(16, 1.0)), tmp_path / place / "shapes" / "now")
    assert [run.name for run in read(tmp_path / "one/shapes/now", tmp_path / "other/shapes")] == [
        "one/shapes/now",
        "other/shapes/now",
    ]


ODD_FILES = [
    ("status.json", "[]"),
    ("status.json", "{"),
    ("status.json", "5"),
    ("config.yaml", "- 1"),
    ("config.yaml", "seed: 1"),
    (
        "metrics.jsonl",
        '{"images_seen": Infinity, "seconds": 1}\n'
        '{"images_seen": 1, "seconds": 1, "train/images_per_second": "x"}',
    ),
    ("evaluation/evaluation.json", '{"prompt_accuracy": 5}'),
    ("evaluation/evaluation.json", '{"prompt_accuracy": {}}'),
    ("config.yaml", "- a"),
    ("config.yaml", "a: [\n"),
    ("config.yaml", "\xff"),
    ("metrics.jsonl", '[]\n{"seconds": "x"}\n{'),
    ("config.yaml", "seed: [0, 1]"),
    ("validation/000000000200.json", "[]"),
    ("validation/000000000200.json", '{"log_snr": 1}'),
    ("evaluation", "a file"),
]


def made_odd(folder, file, content):
    path = folder / file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.encode("latin-1"))


@pytest.mark.parametrize(("file", "content"), ODD_FILES)
def test_an_odd_run_is_listed_once_beside_another(write, errors, read, text_of, file, content):
    """Named three times, too; and every section says what it has to say of the two."""
    sweep = write("a", errors(16, 1.0)).parent
    made_odd(write("b", errors(16, 1.2), config={"x": 1}), file, content)
    runs = read(sweep, sweep / "a", sweep / ".." / "sweep" / "b")
    assert [run.name for run in runs] == ["a", "b"]
    comparison = compare(runs)
    said = "\n".join(summary_lines(comparison))
    assert len(re.findall("^1. a: ", said, re.MULTILINE)) == 1
    others = re.findall(r"^(2\. b|not finished: b|not compared: b)\b", said, re.MULTILINE)
    assert len(others) == 1
    sections = [
        ranking_section(comparison),
        left_out_section(comparison),
        configuration_section(runs),
        cost_section(runs),
        loss_difference_section(*runs),
    ]
    assert "a" in build_objectives(comparison).built
    assert "| b |" in text_of(*sections)


def test_no_odd_run_and_no_odd_name_spoils_the_report(write, errors, report, recwarn):
    """All of them in one, with its plots."""
    sweep = write("a$_$b", errors(16, 1.0)).parent
    for number, name in enumerate(("_x", os.fsdecode(b"c\xff"), "\u7eff")):
        write(name, errors(16, 1.1 + number), config={"x": number})
    for number, (file, content) in enumerate(ODD_FILES):
        made_odd(write(f"odd{number}", errors(16, 9.0), config={"y": number}), file, content)
    said = report(sweep)
    for line in ("1. a$_$b: ", "2. _x: ", "3. c?: "):
        assert len(re.findall(f"^{re.escape(line)}", said, re.MULTILINE)) == 1, line
    assert not [one for one in recwarn if "Glyph" in str(one.message)]
    text = (sweep / "report" / "report.md").read_text()
    costs = text.partition("## Speed and memory")[2]
    for number, (file, content) in enumerate(ODD_FILES):
        assert costs.count(f"| odd{number} |") == 1, f"{file}: {content}"


def test_a_legend_shows_a_name_as_it_is():
    figure = Figure()
    axis = figure.add_subplot()
    axis.plot([0, 1], label=figures.legend_label("_a$_$b"))
    assert [text.get_text() for text in axis.legend().get_texts()] == [r" _a\$_\$b"]


def test_a_run_whose_process_is_gone_was_killed(write, errors, summary_of):
    sweep = write("a", errors(16, 1.0)).parent
    (write("b", errors(16, 1.0), state="running") / ".lock").touch()
    write("c", errors(16, 1.0), state="running")
    with hold_lock(write("d", errors(16, 1.0), state="running"), print):
        # Asked by another process, it is there.
        words = [sys.executable, "-c", LEFT_BEHIND, str(sweep / "d")]
        assert subprocess.run(words, check=False).returncode == 0
    said = summary_of(sweep)
    assert "not finished: b, killed at 200 images" in said
    assert "not finished: c, running at 200 images" in said


def test_an_arm_that_has_never_begun_is_in_the_report(write, errors, read, summary_of, text_of):
    sweep = write("a", errors(16, 1.0)).parent
    write("c", errors(16, 1.0), config={"x": 1})
    (sweep / "sweep.json").write_text(json.dumps({"command": [], "arms": ["a", "b", "c"]}))
    assert "not finished: b, not started at 0 images" in summary_of(sweep)
    differ = text_of(configuration_section(read(sweep)))
    assert "| x |" in differ
    assert "optimizer.lr" not in differ  # of b nothing is known: that is no difference


def test_an_arm_that_was_refused_as_it_was_built_has_failed(write, errors, summary_of):
    sweep = write("a", errors(16, 1.0)).parent
    (sweep / "b").mkdir()
    (sweep / "b" / "status.json").write_text('{"state": "failed", "exit_code": 2}')
    (sweep / "sweep.json").write_text(json.dumps({"command": [], "arms": ["a", "b"]}))
    assert "not finished: b, failed at 0 images" in summary_of(sweep)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["nowhere"], "nowhere"),
        (["empty"], "empty"),
        (["sweep/a", "--baseline", "z"], "--baseline z"),
        (["sweep/a", "--output", "/proc/x"], "--output"),
    ],
)
def test_what_holds_no_runs_is_said(write, errors, tmp_path, here, words, named):
    (tmp_path / "empty").mkdir()
    write("a", errors(16, 1.0))
    result = here("sdtrain-report", *words, cwd=tmp_path)
    assert result.code == (5 if named == "--output" else 2)
    assert named in result.paragraph


def test_names_that_print_alike_are_shown_all_the_same(write, errors, summary_of):
    for number, name in enumerate((b"c\xff", b"c\xfe")):
        folder = write(os.fsdecode(name), errors(16, 1.0 + number), config={"x": number})
    said = "\n".join(summary_of(folder.parent))
    assert len(re.findall(r"^\d\. .*c.: ", said, re.MULTILINE)) == 2


def test_what_is_refused_needs_no_torch(write, errors, tmp_path):
    """In a fresh process: a folder that is none, an unknown flag, an unknown baseline."""
    folder = str(write("a", errors(4, 1.0)))
    commands = [[f"{tmp_path}/none"], [folder, "--unknown"], [folder, "--baseline=z"]]
    code = [sys.executable, "-c", WITHOUT_TORCH, json.dumps(commands)]
    result = subprocess.run(code, capture_output=True, text=True)
    assert result.stdout.splitlines() == ["2 False"] * 3, result.stderr


def test_runs_of_moved_classes_are_no_other_runs(write, errors, read):
    """Of which one was written before the classes got their present names: two seeds of one arm."""
    old = {"model": {"_target_": "sdtrain.module.DiffusionModule"}}
    new = {"model": {"_target_": "sdtrain.latent_diffusion.LatentDiffusion"}}
    write("seed=0", errors(8, 1.0), config=old)
    runs = read(write("seed=1", errors(8, 1.1), config=new | {"seed": 1}).parent)
    assert list(differing_keys(runs)) == ["seed"]
    assert len(group_by_arm(runs)) == 1


def test_a_run_of_code_that_is_not_ours_is_compared_all_the_same(write, errors, read):
    sweep = write("a", errors(16, 1.0)).parent
    write("b", errors(16, 1.2), config={"weighting": {"_target_": "os.abort"}})
    comparison = compare(read(sweep))
    assert [arm.name for arm in comparison.arms] == ["a", "b"]
    (line,) = build_objectives(comparison).failures
    assert re.search("b: its effective weight is not shown: .*os.abort", line)
    assert "allow=" not in line  # sdtrain-report has no such key
