"""A prompt or a path may hold any character: what was typed is what arrives."""

import pwd
import random
import re

import pytest
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from sdtrain.config.boundary import refuse_repeated_options
from sdtrain.config.flags import FLAGS_WITHOUT_VALUE, SHORT_NAMES
from sdtrain.config.overrides import (
    QUOTED,
    QUOTED_LIST,
    choose_options,
    is_sweep,
    prepare_arguments,
)
from sdtrain.config.path_keys import is_path
from sdtrain.config.precheck import precheck_config
from sdtrain.paths import config_dir

NASTY = [
    "a, b, and c",
    "it's",
    'say "hi"',
    """both ' and " """,
    "[x]",
    "[a, b]",
    "{a: 1}",
    "a: b",
    "a=b",
    "x=[1,2]",
    "${x}",
    "$${x}",
    "\\${x}",
    "\\\\${x}",
    "${oc.env:HOME}",
    "\\",
    "\\\\",
    "a\\",
    "a\\'",
    "\\'",
    "'",
    '"',
    "'a",
    "a'",
    '"a',
    'a"',
    "''x",
    "'a' or 'b'",
    "'a','b'",
    " lead",
    "trail ",
    "two\nlines",
    "line\n",
    "\\\n",
    "tab\there",
    "é ü ß",
    "日本の星",
    "🎨 a star",
    "#1",
    "~",
    "@home",
    "100%",
    "(a)",
    "null ",
    "true",
    "1e3",
    "0x10",
    "$",
    "${",
    "}",
    "]",
    "['a",
    "???",
    "a\\b\\c",
    "C:\\pictures\\",
]
parser = OverridesParser.create()


def arriving(word: str) -> object:
    """The value that Hydra and OmegaConf make of one word of the command line."""
    override = parser.parse_override(word)
    return OmegaConf.to_container(OmegaConf.create({"it": override.value()}), resolve=True)["it"]


@pytest.mark.parametrize("value", NASTY)
def test_a_value_arrives_as_typed(value):
    for key in ("prompt", "data.path", "hydra.run.dir", "+name"):
        if not (key.startswith("hydra.") and "${" in value):  # there ${now:...} keeps its meaning
            if value == "~" and key in ("data.path", "hydra.run.dir"):
                continue  # a home
            (word,) = prepare_arguments([f"{key}={value}"])
            assert word.startswith(f"{key}=") and arriving(word) == value
    (word,) = prepare_arguments([f"prompt={value}"], repeatable=["prompt"])
    assert arriving(word) == [value]


def test_any_value_arrives_as_typed():
    draw = random.Random(0)
    values = [
        "".join(draw.choices("ab ,'\"\\${}[]():=~#\né🎨", k=draw.randint(1, 9))) for _ in range(500)
    ]
    values = [
        value
        for value in values
        if not QUOTED.fullmatch(value) and not QUOTED_LIST.fullmatch(value)
    ]
    assert len(values) > 480
    wrong = {
        value: word
        for value in values
        if (word := prepare_arguments([f"prompt={value}"])[0]) and _arriving_or_error(word) != value
    }
    assert not wrong


def test_without_quoting_they_do_not_arrive():
    wrong = [value for value in NASTY if _arriving_or_error(f"prompt={value}") != value]
    assert len(wrong) > len(NASTY) / 2


def _arriving_or_error(word: str) -> object:
    try:
        return arriving(word)
    except Exception as error:
        return error


@pytest.mark.parametrize(
    ("words", "prompts"),
    [
        (["prompt=a, b", "prompt=c"], ["a, b", "c"]),
        (["seed=1", "prompt=a", "steps=2", "prompt='b, c'"], ["a", "b, c"]),
        (['prompt=["a","b, [c]"]'], ["a", "b, [c]"]),
        (["prompt=['a','b']", "prompt=[c]"], ["a", "b", "[c]"]),
        (["prompt="], [""]),
    ],
)
def test_repeated_prompts_become_one_list(words, prompts):
    found = [
        word
        for word in prepare_arguments(words, repeatable=["prompt"])
        if word.startswith("prompt=")
    ]
    assert len(found) == 1 and arriving(found[0]) == prompts


def test_no_prompt_is_no_prompt(composed):
    assert composed(
        *prepare_arguments(["checkpoint=x", "prompt=null"], repeatable=["prompt"]), config="sample"
    )["prompt"] in (None, [])


@pytest.mark.parametrize("value", ["'a, b'", '"a, b"', " 'a, b' ", "'a, b'\n"])
def test_a_quoted_value_stays_quoted(value):
    assert arriving(prepare_arguments([f"prompt={value}"])[0]) == "a, b"


def test_flags_come_first_and_other_words_stay_as_they_are():
    words = ["a=1,2", "-m", "optimizer.lr=choice(1,2)", "~callbacks.ema", "--help"]
    assert prepare_arguments(words) == [
        "--multirun",
        "--help",
        "a=1,2",
        "optimizer.lr=choice(1,2)",
        "~callbacks.ema",
    ]


def test_a_sweep_over_prompts_stays_a_sweep_and_a_folder_keeps_its_interpolation():
    assert prepare_arguments(["-m", "prompt=a,b"]) == ["--multirun", "prompt=a,b"]
    assert prepare_arguments(["hydra.run.dir=runs/${now:%H}"]) == ["hydra.run.dir=runs/${now:%H}"]


def test_a_home_is_where_a_path_begins(monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    root = pwd.getpwuid(0)
    of_root = f"~{root.pw_name}/x"
    keys = (
        *("hydra.run.dir", "hydra.sweep.dir", "output", "checkpoint", "prompt_file"),
        *("autoencoder", "model.autoencoder.path", "data.path", "data.font", "+data.path"),
        *("model.conditioner.tokenizer", "schedule.betas", "schedule.alphas_cumprod"),
    )
    for key in keys:
        for value, meant in (
            ("~/a, b", "/h/a, b"),
            ("~", "/h"),
            (of_root, f"{root.pw_dir}/x"),
            ("'~/a'", "/h/a"),
            ("~nobody-of-that-name/x", "~nobody-of-that-name/x"),
            ("a,~/b", "a,~/b"),
            ("a~", "a~"),
        ):
            (word,) = prepare_arguments([f"{key}={value}"])
            assert arriving(word) == meant, word
    for typed, read in (
        (["-m", "data.path=~/a,~/b"], ["--multirun", "data.path=/h/a,/h/b"]),
        (["-m", "hydra.sweep.dir=~/a,~/b"], ["--multirun", "hydra.sweep.dir='/h/a,~/b'"]),
        (["hydra.searchpath=[file://~/a,~/b]"], ["hydra.searchpath=[file:///h/a,/h/b]"]),
        (["--config-dir=~/c", "-cd", "~/d"], ["--config-dir=/h/c", "--config-dir=/h/d"]),
        (["name=~/x", "prompt=~"], ["name='~/x'", "prompt='~'"]),
    ):
        assert prepare_arguments(typed) == read


def test_a_home_in_a_yaml_is_one_too(composed, monkeypatch, tmp_path):
    """As in one of the user's own, whose words nobody types."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "b").write_text("0.001 0.002")
    config = composed("schedule=table", "schedule.betas='~/b'")
    config["model"]["autoencoder"]["path"] = "~/c"
    found = precheck_config(config | {"data": config["data"] | {"path": "~/a"}}, ()).config
    assert found["data"]["path"] == f"{tmp_path}/a"
    assert found["schedule"]["betas"] == f"{tmp_path}/b"
    assert found["model"]["autoencoder"]["path"] == f"{tmp_path}/c"


def test_every_path_that_a_yaml_offers_is_one():
    """What its comment calls a folder or a file."""
    offered = set()
    for file in config_dir().rglob("*.yaml"):
        group = file.parent.relative_to(config_dir()).parts
        commented = re.findall(r"(\w+): .*# (?:a |text )?(?:folder|file) ", file.read_text())
        offered |= {".".join([*group, name]) for name in commented}
    assert {"data.path", "data.font", "model.autoencoder.path", "checkpoint"} < offered
    assert {key for key in offered if not is_path(key)} == {"data.name"}


def test_a_flag_means_the_same_however_it_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wanted = [f"--config-dir={tmp_path}/conf", "--config-name=own", "--multirun", "seed=1,2"]
    for words in (
        "--config-dir conf --config-name own -m seed=1,2",
        "seed=1,2 --multi -cd=conf -cn own",
        "-m -cn=own seed=1,2 --config-d ./conf",
        f"--config-dir={tmp_path}/conf --config-n=own --multirun seed=1,2",
    ):
        assert sorted(prepare_arguments(words.split())) == sorted(wanted)
        assert is_sweep(words.split())
    assert is_sweep(["hydra.mode=MULTIRUN"]) and not is_sweep(["--config-name", "-m"])
    assert prepare_arguments(["--info", "searchpath", "--info", "a=1"]) == [
        "--info=searchpath",
        "--info",
        "a=1",
    ]


def test_the_flags_are_those_of_hydra():
    parser = get_args_parser()
    found = {}
    for action in parser._actions:
        if action.option_strings:
            long, *short = action.option_strings
            found[long] = short[0] if short else None
            assert (action.nargs == 0) == (long in FLAGS_WITHOUT_VALUE)
    assert found == SHORT_NAMES


def test_a_pickled_configuration_is_refused(here, tmp_path):
    result = here("sdtrain", "--experimental-rerun", "x.pickle", cwd=tmp_path)
    assert result.code == 2
    assert "--experimental-rerun" in result.paragraph


def test_flags_in_any_place(here, tiny, tmp_path):
    result = here("sdtrain", "seed=3", "--cfg", "job", "steps=7", cwd=tmp_path)
    assert result.code == 0 and "seed: 3" in result.out and "steps: 7" in result.out


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("metrics=retrieval", "metric=[retrieval]"),
        ("metrics=[retrieval,sampler_error]", "metric=[retrieval,sampler_error]"),
        ("metrics=[ retrieval, retrieval ]", "metric=[retrieval]"),
        ("metrics='retrieval'", "metric=['retrieval']"),
        ("metrics=", "metric=[]"),
        ("metrics=null", "metric=[]"),
        ("metrics=retrieval,sampler_error", "metric=retrieval,sampler_error"),
        ("metrics.sampler_error.steps=[2,4]", "metrics.sampler_error.steps=[2,4]"),
        ("prompt=metrics=retrieval", "prompt=metrics=retrieval"),
        ("--multirun", "--multirun"),
    ],
)
def test_metrics_are_chosen_by_their_key(typed, read):
    assert choose_options(typed) == read


def test_chosen_metrics_are_composed_in_their_order(composed):
    words = [
        choose_options("metrics=[sampler_error,retrieval]"),
        "metrics.retrieval.max_pictures=3",
    ]
    metrics = composed(*words, "checkpoint=RUN", config="evaluate")["metrics"]
    assert list(metrics) == ["sampler_error", "retrieval"]
    assert metrics["retrieval"]["max_pictures"] == 3
    default = composed("checkpoint=RUN", config="evaluate")["metrics"]
    assert list(default) == ["prompt_accuracy"]


@pytest.mark.parametrize("word", ["modifiers=[shift,shift]", "+modifiers=[clip, 'shift',shift ]"])
def test_an_option_that_is_chosen_twice_is_refused(here, word, tmp_path):
    for command in ("sdtrain", "sdtrain-schedule"):
        result = here(command, word, cwd=tmp_path)
        assert result.code == 2, result.err
        assert "modifiers names shift twice" in result.paragraph


def test_values_may_repeat():
    """Only a list of options loses one."""
    refuse_repeated_options(["callbacks.samples.guidance_scales=[2,2]"])


def test_several_values_without_m_are_answered_with_it(here, tmp_path):
    result = here("sdtrain", "schedule=linear,cosine", cwd=tmp_path)
    assert result.code == 2 and " -m" in result.paragraph
    assert list(tmp_path.iterdir()) == []
