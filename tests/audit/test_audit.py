"""sdtrain-schedule: its numbers against tables made here, its duplicates, its refusals."""

import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image

from sdtrain.audit import plot
from sdtrain.audit.audit import write_audit
from sdtrain.audit.entries import make_entries
from sdtrain.audit.request import GROUPS, AuditRequest, Combination, expand, read_request
from sdtrain.audit.table import entries_table
from sdtrain.config.overrides import typed_keys
from sdtrain.errors import UserError
from sdtrain.paths import config_dir
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
ODD_FOLDER = """it's here, "a" = [1]"""


@dataclass
class Audit:
    """What the command has printed and written."""

    said: str
    entries: dict[str, dict]
    picture: Path


@pytest.fixture(scope="module")
def whole(here, tmp_path_factory):
    """The whole command, once: two tables, and a schedule that refuses the prediction."""
    output = tmp_path_factory.mktemp("audit") / ODD_FOLDER
    words = ["schedule=linear,scaled_linear,flow", "prediction=epsilon", "weighting=min_snr"]
    of_a_run = ["steps=7", "data.batch_size=8", "optimizer=adamw", "sampler=euler"]
    result = here("sdtrain-schedule", *words, *of_a_run, f"output={output}")
    assert result.code == 0, result.err
    entries = json.loads((output / "schedules.json").read_text())
    by_name = {entry["name"]: entry for entry in entries}
    return Audit(result.out, by_name, output / "schedules.png")


def option_node(group, name):
    """The node of an option, as its file has it."""
    return yaml.safe_load((config_dir() / group / f"{name}.yaml").read_text())


def set_word(nodes, word):
    """Put what a word chooses or sets into the nodes of a combination."""
    override = OverridesParser.create().parse_override(word)
    value = override.value()
    group, *inner = override.get_key_element().split(".")
    if inner:
        node = nodes[group]
        for name in inner[:-1]:
            node = node[name]
        assert inner[-1] in node, word
        node[inner[-1]] = value
    elif group == "modifiers":
        nodes[group] = {}
        for name in value:
            nodes[group] |= option_node(group, name)
    else:
        nodes[group] = option_node(group, value)


@pytest.fixture(scope="module")
def combine(composed):
    """combine("schedule=linear,cosine", ...) -> the combinations that read_request makes of the
    words. The options are put in here, so that Hydra is asked once for all."""

    def made(*words):
        combinations = []
        for label, overrides in expand(words):
            config = composed()
            nodes = {group: config.get(group) or {} for group in GROUPS}
            for word in overrides:
                set_word(nodes, word)
            combinations.append(Combination(label, nodes, frozenset(typed_keys(overrides))))
        return combinations

    return made


@pytest.fixture(scope="module")
def entries_of(combine):
    """entries_of(words) -> the entries by name."""
    return lambda *words: {entry.name: entry for entry in make_entries(combine(*words))}


def test_a_request_combines_all_values_of_all_words(combine):
    words = ["modifiers=[shift]", "prediction=v", "schedule=laplace", "schedule.scale=0.5,1"]
    request = read_request([*words, "output=there"])
    assert request.combinations == combine(*words)
    assert request.output == Path("there")


@pytest.mark.parametrize("name", ALPHA_BAR)
def test_the_numbers_of_tables(whole, name):
    entry = whole.entries[name]
    bar = ALPHA_BAR[name]
    log_snr = np.log(bar / (1 - bar))
    assert entry["terminal_snr"] == pytest.approx(bar[-1] / (1 - bar[-1]), rel=1e-9)
    assert entry["terminal_alpha"] == pytest.approx(bar[-1] ** 0.5, rel=1e-9)
    assert entry["leaked_mean"] == entry["terminal_alpha"]
    assert entry["leaked_variance"] == pytest.approx(bar[-1], rel=1e-9)  # of unit variance
    assert entry["log_snr_at_0"] == pytest.approx(log_snr[0], rel=1e-9)
    assert entry["log_snr_at_1"] == pytest.approx(log_snr[-1], rel=1e-9)
    places = np.array(entry["effective_weight"]["log_snr"])
    weight = np.array(entry["effective_weight"]["weight"])
    # The share of a point over the way between its neighbours' middles, times min(1, 5 / SNR).
    point = np.abs(log_snr[:, None] - places).argmin(0)
    edges = np.concatenate([log_snr[:1], (log_snr[1:] + log_snr[:-1]) / 2, log_snr[-1:]])
    expected = (1 / (edges[:-1] - edges[1:]))[point] * np.minimum(1, 5 * np.exp(-places))
    # A place on an edge may fall to either side.
    inside = np.abs(places[:, None] - edges).min(1) > 1e-6
    ratio = weight[inside] / expected[inside]
    assert ratio.std() / ratio.mean() < 1e-9
    assert np.trapezoid(weight, places) == pytest.approx(1)


@pytest.mark.parametrize("name", ALPHA_BAR)
@pytest.mark.parametrize("steps", [10, 25, 50])
def test_the_levels_visited_are_those_of_the_grid(entries_of, name, steps):
    bar = ALPHA_BAR[name]
    log_snr = np.log(bar / (1 - bar))
    (entry,) = entries_of(f"schedule={name}", "grid=trailing").values()
    points = np.arange(1000, 0, -1000 // steps) - 1
    assert entry.record()["visited"][str(steps)] == pytest.approx(log_snr[points], abs=1e-9)


def test_the_command_writes_a_table_and_a_picture_to_a_folder_of_any_name(whole):
    assert list(whole.entries) == ["linear", "scaled_linear", "flow"]
    assert "linear" in whole.said
    assert "6.8 %" in whole.said
    assert "0.47 %" in whole.said
    with Image.open(whole.picture) as picture:
        picture.load()


def test_infinite_ends_are_numbers_of_json(whole):
    entry = whole.entries["flow"]
    assert entry["terminal_snr"] == 0
    assert entry["terminal_alpha"] == 0
    assert entry["log_snr_at_0"] == math.inf
    assert entry["log_snr_at_1"] == -math.inf


def test_words_that_only_a_run_reads_are_named(whole):
    assert "No effect here, only on a run: data.batch_size, optimizer, steps." in whole.said


def test_what_is_refused_is_said_and_the_rest_is_shown(whole):
    assert whole.entries["linear"]["refused"] is None
    assert "prediction=epsilon" in whole.entries["flow"]["refused"]
    assert "prediction=epsilon" in whole.said


def test_where_all_is_refused_the_command_fails_and_has_written_why(combine, tmp_path):
    combinations = combine("modifiers=[zero_terminal_snr]", "prediction=epsilon")
    with pytest.raises(UserError) as refused:
        write_audit(AuditRequest(combinations, tmp_path / "alone", []))
    assert "prediction=epsilon" in str(refused.value)
    (entry,) = json.loads((tmp_path / "alone" / "schedules.json").read_text())
    assert "modifiers=[zero_terminal_snr]" in entry["refused"]


def test_duplicates_and_other_parameterisations_are_named(entries_of):
    entries = entries_of("prediction=epsilon,v", "weighting=epsilon,min_snr,simple")
    assert len(entries) == 6
    twin = entries["scaled_linear, epsilon, epsilon"]
    other = entries["scaled_linear, epsilon, min_snr"]
    alone = entries["scaled_linear, v, simple"]
    assert twin.duplicate_of == ["scaled_linear, epsilon, simple"]
    assert twin.same_objective_as == ["scaled_linear, v, epsilon"]
    assert other.duplicate_of == []
    assert other.same_objective_as == ["scaled_linear, v, min_snr"]
    assert alone.duplicate_of == []
    assert alone.same_objective_as == []
    note = "same objective with another prediction: scaled_linear, epsilon, min_snr"
    assert note in entries["scaled_linear, v, min_snr"].notes


def test_another_loss_is_another_objective(entries_of):
    entries = entries_of("prediction=epsilon", "weighting=epsilon,simple", "loss=huber,mse")
    huber = entries["scaled_linear, epsilon, huber"]
    assert huber.duplicate_of == ["scaled_linear, simple, huber"]


def test_another_output_is_the_same_objective_under_squares_alone(entries_of):
    entries = entries_of("prediction=epsilon,v", "weighting=epsilon", "loss=huber")
    assert all(entry.same_objective_as == [] for entry in entries.values())


def test_modifiers_and_numbers_are_swept(entries_of):
    modifiers = "modifiers=[],[shift],[shift,zero_terminal_snr]"
    entries = entries_of(modifiers, "prediction=v", "weighting=simple")
    assert list(entries) == [
        "scaled_linear",
        "scaled_linear+shift",
        "scaled_linear+shift+zero_terminal_snr",
    ]
    start = entries["scaled_linear"].schedule.log_snr_max
    shifted = entries["scaled_linear+shift"].schedule.log_snr_max
    assert shifted == pytest.approx(start - 2 * math.log(3))
    entries = entries_of("schedule=laplace", "schedule.scale=0.5,1")
    assert list(entries) == ["laplace, schedule.scale=0.5", "laplace, schedule.scale=1"]


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["schedule=none"], "schedule"),
        (["+foo=1"], "foo"),
    ],
)
def test_a_request_that_does_not_fit_the_configuration_is_refused(words, key):
    with pytest.raises(UserError) as refused:
        read_request(words)
    assert refused.value.key == key


def test_settings_of_a_modifier_that_is_not_selected_are_refused():
    request = read_request(["+modifiers.shift.factor=2"])
    with pytest.raises(UserError) as refused:
        make_entries(request.combinations)
    assert "modifiers=[shift]" in str(refused.value)


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["schedule.beta_start=-1"], "schedule.beta_start"),
        (["schedule=linear", "schedule.beta_end=abc"], "schedule.beta_end"),
        (["schedule=table"], "schedule.betas"),
        (["grid=karras", "grid.rho=0"], "grid.rho"),
        (["grid=karras", "grid.rho=inf"], "grid.rho"),
        (["schedule=sigmoid", "schedule.temperature=0.002"], "schedule"),
        (["modifiers=[shift]", "modifiers.shift.factor=1e9"], "modifiers.shift.factor"),
        (["schedule=laplace", "schedule.centre=50"], "schedule.log_snr_min"),
    ],
)
def test_mistakes_of_the_user_are_no_bugs_of_ours(entries_of, words, key):
    with pytest.raises(UserError) as refused:
        entries_of(*words)
    assert refused.value.key == key


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["times=logit_normal", "times.mean=nan"], "times.mean"),
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
def test_an_objective_that_cannot_be_trained_is_refused_in_its_row(entries_of, words, said):
    (entry,) = entries_of(*words).values()
    assert said in str(entry.refusal)
    assert entry.refusal.exit_code == 2


def test_a_folder_that_cannot_be_written_to_is_named(here):
    result = here("sdtrain-schedule", "output=/proc/x")
    assert result.code == 5
    assert "output" in result.paragraph


def test_help(here):
    assert "sdtrain-schedule schedule=" in here("sdtrain-schedule", "--help").out


def test_a_table_from_a_file_of_any_name_and_fewer_steps_than_are_drawn(tmp_path):
    file = tmp_path / "my betas, v=2 (final).txt"
    file.write_text("0.1, 0.2, 0.3,\n")
    words = ["schedule=table", f"schedule.betas={file}", "schedule.num_timesteps=3"]
    combinations = read_request(words).combinations
    (entry,) = make_entries(combinations)
    assert entry.record()["terminal_snr"] == pytest.approx(0.504 / 0.496)
    assert entry.record()["visited"] == {}


def test_what_is_refused_needs_no_torch():
    """In a fresh process: an unknown group, option, key and flag."""
    commands = [["schedul=linear"], ["schedule=linaer"], ["schedule.beta=1"], ["-m"]]
    code = [sys.executable, "-c", WITHOUT_TORCH, json.dumps(commands)]
    result = subprocess.run(code, capture_output=True, text=True)
    assert result.stdout.splitlines() == ["2 False"] * 4, result.stderr
    paragraphs = result.stderr.split("sdtrain: ")[1:]
    for key, paragraph in zip(("schedul", "linear", "beta", "-m"), paragraphs, strict=True):
        assert key in paragraph


def test_log_snr_rises_to_the_right(monkeypatch, combine):
    """From noise to data, in both plots over it and in the table, as in the plots of a report."""
    entries = make_entries(combine("schedule=cosine"))
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
