"""sdtrain-schedule: its numbers against tables made here, its duplicates, its refusals."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from sdtrain.audit import plot
from sdtrain.audit.entries import make_entries
from sdtrain.audit.request import read_request
from sdtrain.audit.table import entries_table
from sdtrain.plots import LOG_SNR

WITHOUT_TORCH = """
import json, sys
from sdtrain.commands import schedule
for words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    try:
        schedule.main()
    except SystemExit as left:
        print(left.code, "torch" in sys.modules)
"""
ALPHA_BAR = {
    "linear": np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)),
    "scaled_linear": np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2),
}


@pytest.fixture
def audit(here, tmp_path):
    """audit(words) -> (the entries of the JSON by name, what was printed)."""

    def run(*words):
        result = here("sdtrain-schedule", *words, f"output={tmp_path}/out [1]")
        assert result.code == 0, result.err
        with Image.open(tmp_path / "out [1]" / "schedules.png") as picture:
            picture.load()
        return {
            entry["name"]: entry
            for entry in json.loads((tmp_path / "out [1]" / "schedules.json").read_text())
        }, result.out

    return run


def test_the_numbers_of_tables(audit):
    entries, said = audit(
        "schedule=linear,scaled_linear", "prediction=epsilon", "weighting=min_snr"
    )
    assert list(entries) == ["linear", "scaled_linear"]
    for name, entry in entries.items():
        bar = ALPHA_BAR[name]
        log_snr = np.log(bar / (1 - bar))
        assert entry["terminal_snr"] == pytest.approx(bar[-1] / (1 - bar[-1]), rel=1e-9)
        assert (
            entry["terminal_alpha"]
            == entry["leaked_mean"]
            == pytest.approx(bar[-1] ** 0.5, rel=1e-9)
        )
        assert entry["leaked_variance"] == pytest.approx(
            bar[-1], rel=1e-9
        )  # of latents of unit variance
        assert [entry["log_snr_at_0"], entry["log_snr_at_1"]] == pytest.approx(
            [log_snr[0], log_snr[-1]], rel=1e-9
        )
        for steps in (10, 25, 50):
            assert entry["visited"][str(steps)] == pytest.approx(
                log_snr[np.arange(1000, 0, -1000 // steps) - 1], abs=1e-9
            )
        # The share of a point over the way between its neighbours' middles, times min(1, 5 / SNR).
        places = np.array(entry["effective_weight"]["log_snr"])
        weight = np.array(entry["effective_weight"]["weight"])
        point = np.abs(log_snr[:, None] - places).argmin(0)
        edges = np.concatenate([log_snr[:1], (log_snr[1:] + log_snr[:-1]) / 2, log_snr[-1:]])
        expected = (1 / (edges[:-1] - edges[1:]))[point] * np.minimum(1, 5 * np.exp(-places))
        inside = (
            np.abs(places[:, None] - edges).min(1) > 1e-6
        )  # a place on an edge may fall to either side
        ratio = weight[inside] / expected[inside]
        assert ratio.std() / ratio.mean() < 1e-9
        assert np.trapezoid(weight, places) == pytest.approx(1)
    assert "linear" in said
    assert "6.8 %" in said
    assert "0.47 %" in said


def test_infinite_ends_are_numbers_of_json(audit):
    entries, _ = audit("schedule=flow", "prediction=v", "weighting=simple")
    entry = entries["flow"]
    assert (
        entry["terminal_snr"],
        entry["terminal_alpha"],
        entry["log_snr_at_0"],
        entry["log_snr_at_1"],
    ) == (0, 0, math.inf, -math.inf)


def test_duplicates_and_other_parameterisations_are_named(audit):
    entries, said = audit("prediction=epsilon,v", "weighting=epsilon,min_snr,simple")
    assert len(entries) == 6
    twin = entries["scaled_linear, epsilon, epsilon"]
    other = entries["scaled_linear, epsilon, min_snr"]
    assert twin["duplicate_of"] == ["scaled_linear, epsilon, simple"]
    assert twin["same_objective_as"] == ["scaled_linear, v, epsilon"]
    assert other["duplicate_of"] == []
    assert other["same_objective_as"] == ["scaled_linear, v, min_snr"]
    assert (
        entries["scaled_linear, v, simple"]["duplicate_of"]
        == entries["scaled_linear, v, simple"]["same_objective_as"]
        == []
    )
    same = "same objective with another prediction: scaled_linear, epsilon, min_snr"
    assert f"scaled_linear, v, min_snr: {same}" in said
    entries, _ = audit(
        "prediction=epsilon", "weighting=epsilon,simple", "loss=huber,mse"
    )  # another loss is another objective
    assert entries["scaled_linear, epsilon, huber"]["duplicate_of"] == [
        "scaled_linear, simple, huber"
    ]


def test_modifiers_and_numbers_are_swept(audit):
    entries, _ = audit(
        "modifiers=[],[shift],[shift,zero_terminal_snr]", "prediction=v", "weighting=simple"
    )
    assert list(entries) == [
        "scaled_linear",
        "scaled_linear+shift",
        "scaled_linear+shift+zero_terminal_snr",
    ]
    assert entries["scaled_linear+shift"]["log_snr_at_0"] == pytest.approx(
        entries["scaled_linear"]["log_snr_at_0"] - 2 * math.log(3)
    )
    entries, _ = audit("schedule=laplace", "schedule.scale=0.5,1")
    assert list(entries) == ["laplace, schedule.scale=0.5", "laplace, schedule.scale=1"]


def test_what_is_refused_is_said_and_the_rest_is_shown(audit, here, tmp_path):
    entries, said = audit("modifiers=[],[zero_terminal_snr]", "prediction=epsilon")
    assert entries["scaled_linear"]["refused"] is None
    assert "modifiers=[zero_terminal_snr]" in entries["scaled_linear+zero_terminal_snr"]["refused"]
    assert "prediction=epsilon" in said
    result = here(
        "sdtrain-schedule", "schedule=flow", "prediction=epsilon", f"output={tmp_path}/alone"
    )
    assert result.code == 2
    assert "prediction" in result.paragraph
    assert json.loads((tmp_path / "alone" / "schedules.json").read_text())[0]["refused"]


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["schedul=linear"], "schedule"),
        (["schedule=linaer"], "linear"),
        (["schedule.beta_start=-1"], "schedule.beta_start"),
        (["schedule=linear", "schedule.beta_end=abc"], "schedule.beta_end"),
        (["schedule=table"], "schedule.betas"),
        (["-m"], "-m"),
        (["schedule=none"], "schedule"),
        (["grid=karras", "grid.rho=0"], "grid.rho"),
        (["output=/proc/x"], "output"),
    ],
)
def test_bad_words(here, tmp_path, words, key):
    result = here("sdtrain-schedule", f"output={tmp_path}", *words)
    assert result.code in (2, 5)
    assert key in result.paragraph


def test_words_that_only_a_run_reads_are_named(here, tmp_path):
    words = [
        "schedule=linear",
        "prediction=v",
        "weighting=simple",
        "sampler=euler",
        f"output={tmp_path}",
    ]
    assert "No effect" not in here("sdtrain-schedule", *words).out
    said = here("sdtrain-schedule", *words, "steps=7", "data.batch_size=8", "optimizer=adamw").out
    assert "No effect here, only on a run: data.batch_size, optimizer, steps." in said


def test_help(here):
    assert "sdtrain-schedule schedule=" in here("sdtrain-schedule", "--help").out


@pytest.mark.parametrize("name", ["it's here", 'with "quotes"', "a, b = [c]"])
def test_any_folder_name(here, tmp_path, name):
    assert here("sdtrain-schedule", f"output={tmp_path}/{name}").code == 0
    assert (tmp_path / name / "schedules.json").is_file()


def test_a_table_from_a_file_of_any_name_and_fewer_steps_than_are_drawn(audit, tmp_path):
    (tmp_path / "my betas, v=2 (final).txt").write_text("0.1, 0.2, 0.3,\n")
    entries, _ = audit(
        "schedule=table",
        f"schedule.betas={tmp_path}/my betas, v=2 (final).txt",
        "schedule.num_timesteps=3",
    )
    assert entries["table"]["terminal_snr"] == pytest.approx(0.504 / 0.496)
    assert entries["table"]["visited"] == {}


def test_another_output_is_the_same_objective_under_squares_alone(audit):
    entries, _ = audit("prediction=epsilon,v", "weighting=epsilon", "loss=huber")
    assert all(entry["same_objective_as"] == [] for entry in entries.values())


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["times=logit_normal", "times.mean=nan"], "times.mean"),
        (["schedule=sigmoid", "schedule.temperature=0.002"], "schedule"),
        (["+modifiers.shift.factor=2"], "modifiers=[shift]"),
        (["modifiers=[shift]", "modifiers.shift.factor=1e9"], "modifiers.shift.factor"),
        (["schedule=laplace", "schedule.centre=50"], "schedule.log_snr_min"),
        (["+foo=1"], "foo"),
        (["grid=karras", "grid.rho=inf"], "grid.rho"),
        (
            [
                "modifiers=[zero_terminal_snr]",
                "schedule=cosine_log_snr",
                "prediction=v",
                "weighting=flat",
            ],
            "weighting=flat",
        ),
    ],
)
def test_mistakes_of_the_user_are_no_bugs_of_ours(here, tmp_path, words, key):
    result = here("sdtrain-schedule", f"output={tmp_path}/out", *words)
    assert result.code == 2 and key in result.err, result.err


def test_what_is_refused_needs_no_torch():
    """In a fresh process: an unknown group, an unknown key, an unknown flag."""
    commands = [["schedul=linear"], ["schedule.beta=1"], ["-m"]]
    code = [sys.executable, "-c", WITHOUT_TORCH, json.dumps(commands)]
    result = subprocess.run(code, capture_output=True, text=True)
    assert result.stdout.splitlines() == ["2 False"] * 3, result.stderr
    for key, line in zip(
        ("schedul", "beta", "-m"), result.stderr.split("sdtrain: ")[1:], strict=True
    ):
        assert key in line


def test_log_snr_rises_to_the_right(monkeypatch):
    """From noise to data, in both plots over it and in the table, as in the plots of a report."""
    entries = make_entries(read_request(["schedule=cosine"]).combinations)
    figures = []
    monkeypatch.setattr(plot, "render", figures.append)
    plot.plot_entries(entries)
    over_log_snr = [axes for axes in figures[0].axes if axes.get_xlabel() == LOG_SNR]
    assert len(over_log_snr) == 2
    for axes in over_log_snr:
        left, right = axes.get_xlim()
        assert left < right
    (cell,) = entries_table(entries).columns[1].cells
    low, high = map(float, cell.split(" .. "))
    assert low < high
