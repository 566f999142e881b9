"""Comparisons of runs whose numbers are made here, and the page that says them."""

import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from matplotlib.figure import Figure
from PIL import Image

from sdtrain.commands import report as command
from sdtrain.evaluation.noise_level_error import BITS, LEVELS, bits_over
from sdtrain.pictures import write_png
from sdtrain.report import figures
from sdtrain.report.compare import Arm, T, compare, difference, t_quantile, winners
from sdtrain.report.report import shown
from sdtrain.runs.lock import only_run
from sdtrain.runs.reader import find_runs

CONFIG = {
    "name": "shapes",
    "seed": 0,
    "model": {"autoencoder": {"path": "data/shapes_autoencoder"}},
    "optimizer": {"lr": 0.002},
    "schedule": {"_target_": "sdtrain.schedules.scaled_linear.scaled_linear"},
    "modifiers": None,
    "prediction": {"_target_": "sdtrain.diffusion.prediction.Epsilon"},
    "weighting": {"_target_": "sdtrain.diffusion.weighting.simple.Simple"},
    "loss": {"_target_": "sdtrain.diffusion.losses.MSE"},
    "times": {"_target_": "sdtrain.diffusion.times.Uniform"},
    "noise": {"_target_": "sdtrain.diffusion.noise.Gaussian"},
    "grid": {"_target_": "sdtrain.samplers.grids.trailing", "_partial_": True},
}
LINEAR = LEVELS.sigmoid()


def errors(count, scale, seed=0, own=0.0):
    """Errors [count, L]: what all runs share of a picture, and `own` of the run itself."""
    shared = torch.randn(count, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alone = torch.randn(
        count, len(LEVELS), generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64
    )
    return LINEAR * (0.5 * scale * (1 + 0.3 * shared + own * alone))


@pytest.fixture
def write(tmp_path):
    """write(name, errors, ...) -> the folder of a run that has left just that."""

    def made(
        name,
        found,
        *,
        state="finished",
        inside=(-6, 7),
        looks=(100, 200),
        config=None,
        pictures=None,
        **latents,
    ):
        folder = tmp_path / "sweep" / name
        (folder / "validation").mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | (config or {})))
        (folder / "status.json").write_text(
            json.dumps(
                {
                    "state": state,
                    "exit_code": 0 if state == "finished" else 4,
                    "images_seen": looks[-1],
                }
            )
        )
        reached = (LEVELS >= inside[0]) & (LEVELS <= inside[1])
        lines = []
        for number, seen in enumerate(looks):
            worse = torch.where(reached, found * (1 + 0.1 * (len(looks) - 1 - number)), LINEAR)
            record = {
                "images_seen": seen,
                "log_snr": LEVELS.tolist(),
                "inside": reached.tolist(),
                "pictures": pictures or [f"p{i}" for i in range(len(found))],
                "autoencoder": "a" * 64,
                "latent_scale": 0.9,
                "mean": [0.0],
                "variance": [1.0],
                "linear": LINEAR.expand(len(found), -1).tolist(),
                "errors": {"ema": worse.tolist(), "raw": worse.tolist()},
            } | latents
            (folder / "validation" / f"{seen:012d}.json").write_text(json.dumps(record))
            lines.append(
                {
                    "images_seen": seen,
                    "seconds": 10.0,
                    "train/loss": 1 / seen,
                    "train/images_per_second": 50.0,
                }
            )
            lines.append(
                {
                    "images_seen": seen,
                    "seconds": 11.0,
                    "validation/bits_per_dim": (worse.mean(0) @ BITS).item(),
                }
            )
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return made


def test_one_run_under_two_names_differs_by_exactly_nothing(write):
    for name in ("a", "b"):
        write(name, errors(64, 1.0, own=0.1), config={"data": name})
    one, other = compare(find_runs([write("c", errors(64, 1.0, own=0.1)).parent])).arms[:2]
    assert one.common == other.common
    differing = next(arm for arm in (one, other) if arm.difference is not None)
    assert (
        differing.difference.mean == 0
        and differing.difference.half == 0
        and not differing.difference.told
    )


def test_a_difference_of_one_percent_shows_picture_by_picture_and_not_otherwise(write):
    """256 pictures, of which each is far harder or easier than another to both runs."""
    sweep = write("a", errors(256, 1.0, own=0.05)).parent
    write("b", errors(256, 1.01, seed=7, own=0.05), config={"x": 1})
    comparison = compare(find_runs([sweep]), "a")
    (found,) = [arm.difference for arm in comparison.arms if arm.difference]
    assert comparison.arms[0].name == "a" and found.told and found.over == "pictures"
    assert found.mean == pytest.approx(0.01 * comparison.arms[0].common, rel=0.5)
    assert found.unpaired_half > abs(found.mean) > found.half


def test_the_interval_holds_what_it_says(write):
    """Over 200 pairs of runs that are alike, it misses zero in about one of twenty."""
    arms = [Arm("", [], [], errors(64, 1.0, seed=number, own=0.2), 0, 0) for number in range(400)]
    missed = sum(difference(*arms[2 * i : 2 * i + 2], BITS).told for i in range(200))
    assert 2 <= missed <= 20


@pytest.mark.parametrize("seeds", [2, 3])
def test_over_seeds_there_is_an_interval_from_three_on(write, seeds):
    for seed in range(seeds):
        for name, scale in (("a", 1.0), ("b", 1.1)):
            sweep = write(
                f"arm={name},seed={seed}",
                errors(32, scale + 0.01 * seed, seed=seed, own=0.05),
                config={"seed": seed, "arm": name},
            ).parent
    comparison = compare(find_runs([sweep]), "arm=a,seed=0")
    assert [arm.name for arm in comparison.arms] == ["arm=a", "arm=b"] and [
        len(arm.runs) for arm in comparison.arms
    ] == [seeds, seeds]
    found = comparison.arms[1].difference
    assert found.over == ("seeds" if seeds == 3 else "pictures") and (found.spread is None) == (
        seeds == 3
    )
    assert comparison.arms[1].common - comparison.arms[0].common == pytest.approx(found.mean)


def test_arms_are_ranked_on_the_seeds_that_all_of_them_have(write, monkeypatch, capsys):
    """b has one seed, an easy one: on that seed it is the worse arm."""
    for seed, name, scale in ((0, "a", 0.5), (1, "a", 1.0), (2, "a", 1.0), (0, "b", 0.6)):
        sweep = write(
            f"arm={name},seed={seed}",
            errors(32, scale, own=0.01),
            config={"seed": seed, "arm": name},
        ).parent
    comparison = compare(find_runs([sweep]))
    assert [arm.name for arm in comparison.arms] == ["arm=a", "arm=b,seed=0"] and comparison.arms[
        1
    ].difference.mean > 0
    run_command(monkeypatch, capsys, sweep)
    assert (
        "Taken are the seeds that all arms have, 0; others are left out, as arm=b,seed=0 has no other."
        in (sweep / "report" / "report.md").read_text()
    )


def test_a_seed_for_the_second_time_is_an_arm_of_its_own(write):
    """Three runs of one configuration and seed are no three seeds; and what differs between them is seen."""
    for name, scale in (("a", 1.0), ("b", 1.0), ("c", 1.1)):
        sweep = write(name, errors(16, scale)).parent
    comparison = compare(find_runs([sweep]))
    assert {arm.name: arm.difference and arm.difference.mean > 0 for arm in comparison.arms} == {
        "a": None,
        "b": False,
        "c": True,
    }


def test_seeds_alone_are_one_arm_that_says_how_many(write):
    for number, scale in enumerate((1.0, 1.1, 1.2)):
        sweep = write(
            f"r{number}", errors(32, scale, seed=number, own=0.1), config={"seed": number}
        ).parent
    arms = compare(
        find_runs([sweep])
    ).arms  # with nothing else to compare, they are compared with each other
    assert (
        [arm.name for arm in arms] == ["r0", "r1", "r2"]
        and arms[1].difference.told
        and arms[1].difference.over == "pictures"
    )
    write("s0", errors(32, 2.0), config={"seed": 0, "arm": "s"})
    assert [arm.name for arm in compare(find_runs([sweep])).arms] == ["r0 and 2 other seeds", "s0"]


def test_from_three_seeds_on_all_is_told_over_seeds(write, monkeypatch, capsys):
    """b is better on each picture, and on average of two seeds of three: over seeds nothing is told, neither in sum nor by level."""
    for number, (mine, theirs) in enumerate(((1.0, 0.7), (1.0, 0.7), (1.0, 1.4))):
        sweep = write(
            f"arm=a,seed={number}", errors(64, mine, own=0.01), config={"seed": number, "arm": "a"}
        ).parent
        write(
            f"arm=b,seed={number}",
            errors(64, theirs, own=0.01),
            config={"seed": number, "arm": "b"},
        )
    comparison = compare(find_runs([sweep]), "arm=a")
    found = next(arm.difference for arm in comparison.arms if arm.difference)
    assert (
        found.over == comparison.over == "seeds"
        and not found.told
        and {name for _, name in winners(comparison)} == {None}
    )
    assert found.unpaired_half == pytest.approx(
        found.half, rel=0.2
    )  # a is the same for all seeds: pairing gains nothing
    run_command(monkeypatch, capsys, sweep)
    page = (sweep / "report" / "report.md").read_text()
    assert (
        "none that can be told from the next over seeds" in page
        and "speak of these trained networks" not in page
    )
    run_command(
        monkeypatch,
        capsys,
        sweep / "arm=a,seed=0",
        sweep / "arm=b,seed=0",
        "--output",
        sweep / "one",
    )
    assert (
        "Intervals are over pictures and speak of these trained networks"
        in (sweep / "one" / "report.md").read_text()
    )


def test_numbers_side_by_side_are_of_the_same_pictures(write, monkeypatch, capsys):
    """b has seen 16 pictures more, which are harder; and a has no average of its weights."""
    more = errors(32, 1.0)
    more[16:] *= 5
    sweep = write("b", more, config={"x": 1}).parent
    folder = write("a", errors(16, 1.0), config={"x": 2})
    for path in folder.glob("validation/*.json"):
        record = json.loads(path.read_text())
        del record["errors"]["ema"]
        path.write_text(json.dumps(record))
    run_command(monkeypatch, capsys, sweep)
    page = (sweep / "report" / "report.md").read_text()
    rows = [
        line.split("|")[6:9] for line in page.splitlines() if line.startswith(("| a |", "| b |"))
    ][:2]
    assert (
        rows[0] == rows[1]
        and "on the same 16 held-out pictures" in page
        and "Not all numbers are of averaged weights: a kept none" in page
    )


def test_prompt_accuracy_says_how_it_was_measured(write, monkeypatch, capsys):
    def measured(folder, value, **how):
        settings = {
            "checkpoint": "there/000000000200",
            "num_images": 8,
            "steps": 50,
            "sampler": "sdtrain.samplers.ddim.ddim",
        } | how
        (folder / "evaluation").mkdir(exist_ok=True)
        text = json.dumps(
            {
                "prompt_accuracy": {"trained": {"colour": value}},
                "settings": {"prompt_accuracy": settings},
            }
        )
        (folder / "evaluation" / "evaluation.json").write_text(text)

    first, second = (write(name, errors(16, 1.0), config={"x": name}) for name in "ab")
    measured(first, 0.5)
    measured(second, 0.25)
    run_command(monkeypatch, capsys, first.parent)
    page = (first.parent / "report" / "report.md").read_text()
    assert (
        "Prompt accuracy is of trained combinations: num_images 8, steps 50, ddim, last checkpoint."
        in page
        and "colour 50.0 %" in page
    )
    measured(second, 0.25, checkpoint="there/000000000100", steps=1)
    run_command(monkeypatch, capsys, first.parent)
    page = (first.parent / "report" / "report.md").read_text()
    assert (
        "not measured alike" in page
        and "b: num_images 8, steps 1, ddim, checkpoint at 100 images" in page
    )


def test_seeds_that_disagree_tell_nothing(write):
    for seed, scales in ((0, (1.0, 1.5)), (1, (1.0, 0.8))):
        for name, scale in zip("ab", scales, strict=True):
            sweep = write(
                f"arm={name},seed={seed}", errors(64, scale), config={"seed": seed, "arm": name}
            ).parent
    (found,) = [
        arm.difference for arm in compare(find_runs([sweep]), "arm=a").arms if arm.difference
    ]
    assert found.spread[0] < 0 < found.spread[1] and found.mean > found.half and not found.told
    assert {name for _, name in winners(compare(find_runs([sweep])))} == {None}


def test_a_level_has_a_winner_where_it_can_be_told(write):
    sweep = write("a", errors(16, 1.0, own=0.2)).parent
    write("b", torch.where(LEVELS < 0, 0.5, 1.0) * errors(16, 1.0, own=0.2), config={"x": 1})
    assert winners(compare(find_runs([sweep]))) == [
        (level, "b" if level < 0 else None) for level in range(-6, 8)
    ]


def test_ranks_on_what_all_reach(write):
    sweep = write("wide", errors(16, 1.0), inside=(-12, 12)).parent
    write("narrow", errors(16, 1.0), inside=(-3, 4), config={"x": 1})
    comparison = compare(find_runs([sweep]))
    assert comparison.inside.tolist() == ((LEVELS >= -3) & (LEVELS <= 4)).tolist()
    assert comparison.arms[0].common == comparison.arms[1].common
    exact = (LEVELS[None, :].expand(16, -1) ** 2) @ bits_over(
        comparison.inside
    )  # of a parabola the trapezoid rule makes 1/6 too much for each step
    assert torch.allclose(
        exact * 2 * math.log(2), torch.tensor((4**3 + 3**3) / 3 + 7 / 6, dtype=torch.float64)
    )
    full = {arm.name: arm.runs[0].last.found.summary() for arm in comparison.arms}
    assert (
        full["wide"]["bits_per_dim"] < full["narrow"]["bits_per_dim"]
        and full["wide"]["stand_in_share"] == 0 < full["narrow"]["stand_in_share"]
    )


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"inside": (8, 12)}, "not two noise levels in common"),
        ({"looks": (100,), "seen": 200}, "was at 100 of 200 images"),
        ({"found": errors(16, 1.0) * math.nan}, "errors that are not finite"),
    ],
)
def test_what_has_no_number_to_compare_is_refused_with_the_reason(
    write, capsys, monkeypatch, given, reason
):
    sweep, seen = write("a", errors(16, 1.0)).parent, given.pop("seen", None)
    odd = write("b", **{"found": errors(16, 0.5), "config": {"x": 1}} | given)
    write("c", errors(16, 0.9), config={"x": 2})
    if seen:
        (odd / "status.json").write_text(json.dumps({"state": "finished", "images_seen": seen}))
    said = run_command(monkeypatch, capsys, sweep)
    assert (
        re.search(f"not compared: b, .*{reason}", said)
        and re.search(r"^1\. c: ", said, re.MULTILINE)
        and "nan" not in said
    )


@pytest.mark.parametrize("state", ["diverged", "running"])
def test_a_baseline_that_cannot_be_compared_is_refused(write, capsys, monkeypatch, state):
    sweep = write("a", errors(16, 1.0)).parent
    write("b", errors(16, 0.5), state=state)
    with pytest.raises(SystemExit) as left:
        run_command(monkeypatch, capsys, sweep, "--baseline", "b")
    assert (
        left.value.code == 2
        and f"--baseline b cannot be compared: {state}" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"autoencoder": "b" * 64}, "another autoencoder"),
        ({"latent_scale": 0.8}, "another latent scale"),
        ({"variance": [1.1]}, "mean or variance"),
        ({"pictures": [f"q{i}" for i in range(16)]}, "other validation pictures"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_the_reason(
    write, capsys, monkeypatch, change, reason
):
    sweep = write("a", errors(16, 1.0)).parent
    write("b", errors(16, 0.5), **change)
    write("c", errors(16, 0.9), state="diverged")
    write("d", errors(16, 0.9), config={"x": 1})
    said = run_command(monkeypatch, capsys, sweep)
    assert (
        re.search(f"not compared: b, .*{reason}.* than a", said)
        and "not finished: c, diverged at 200 images" in said
    )
    assert re.search(r"^1\. d: ", said, re.MULTILINE) and re.search(r"^2\. a: ", said, re.MULTILINE)
    page = (sweep / "report" / "report.md").read_text()
    assert "not finished: diverged, exit code 4" in page and reason in page


def run_command(monkeypatch, capsys, *words) -> str:
    monkeypatch.setattr("sys.argv", ["sdtrain-report", *map(str, words)])
    command.main()
    return capsys.readouterr().out


def test_an_arm_that_has_never_begun_is_in_the_report(write, monkeypatch, capsys):
    sweep = write("a", errors(16, 1.0)).parent
    write("c", errors(16, 1.0), config={"x": 1})
    (sweep / "sweep.json").write_text(json.dumps({"command": [], "arms": ["a", "b", "c"]}))
    assert "not finished: b, not begun at 0 images" in run_command(monkeypatch, capsys, sweep)
    differ = (
        (sweep / "report" / "report.md")
        .read_text()
        .partition("What differs in configuration")[2]
        .partition("##")[0]
    )
    assert (
        "| x |" in differ and "optimizer.lr" not in differ
    )  # what b is not known to have is no difference


def test_an_arm_that_was_refused_as_it_was_built_has_failed(write, monkeypatch, capsys):
    sweep = write("a", errors(16, 1.0)).parent
    (sweep / "b").mkdir()
    (sweep / "b" / "status.json").write_text('{"state": "failed", "exit_code": 2}')
    (sweep / "sweep.json").write_text(json.dumps({"command": [], "arms": ["a", "b"]}))
    assert "not finished: b, failed at 0 images" in run_command(monkeypatch, capsys, sweep)


def test_a_look_of_an_earlier_process_that_went_further_is_not_the_runs(write):
    folder = write("a", errors(16, 1.0))
    (folder / "status.json").write_text(json.dumps({"state": "finished", "images_seen": 100}))
    (run,) = find_runs([folder])
    assert run.last.images_seen == 100


def test_two_runs_that_have_not_finished_are_told_by_what_they_train(write, monkeypatch, capsys):
    first = write("a", errors(16, 1.0), state="interrupted")
    weighting = {
        "weighting": {"_target_": "sdtrain.diffusion.weighting.min_snr.MinSNR", "gamma": 5.0}
    }
    second = write("b", errors(16, 1.0), state="running", config=weighting)
    run_command(monkeypatch, capsys, first, second)
    assert "![effective_weights]" in (first / "report" / "report.md").read_text()


def test_any_name_of_a_folder_is_shown(write, monkeypatch, capsys, recwarn):
    sweep = write("a$_$b", errors(16, 1.0)).parent
    for number, name in enumerate(("_x", os.fsdecode(b"c\xff"), "\u7eff")):
        write(name, errors(16, 1.1 + number), config={"x": number})
    said = run_command(monkeypatch, capsys, sweep)
    assert (
        "1. a$_$b: " in said
        and "2. _x: " in said
        and "3. c?: " in said
        and not [one for one in recwarn if "Glyph" in str(one.message)]
    )
    figure = Figure()
    axis = figure.add_subplot()
    axis.plot([0, 1], label=figures.said("_a$_$b"))
    assert [text.get_text() for text in axis.legend().get_texts()] == [r" _a\$_\$b"]


def test_what_differs_is_shown_where_it_differs():
    assert shown(["a" * 90 + "b", "a" * 90 + "c"]) == [
        "... " + "a" * 20 + "b",
        "... " + "a" * 20 + "c",
    ] and shown(["ab", "ac"]) == ["ab", "ac"]
    assert shown(["x" * 90, "y"]) == ["x" * 80 + " ...", "y"]


def test_samples_are_of_the_prompts_that_most_arms_have(write):
    for name, prompt in (("a", "other"), ("b", "same"), ("c", "same")):
        folder = write(name, errors(16, {"a": 0.5, "b": 1.0, "c": 1.1}[name]), config={"x": name})
        (folder / "samples").mkdir()
        write_png(
            Image.new("RGB", (8, 8)),
            folder / "samples" / "pictures-000000200.png",
            {"requests": [{"prompt": prompt, "seed": 0}]},
        )
    sheet, without = figures.samples(compare(find_runs([folder.parent])).arms)
    assert without == ["a"] and sheet is not None


def test_a_run_whose_process_is_gone_was_killed(write, monkeypatch, capsys):
    sweep = write("a", errors(16, 1.0)).parent
    (write("b", errors(16, 1.0), state="running") / ".lock").touch()
    write("c", errors(16, 1.0), state="running")
    with only_run(write("d", errors(16, 1.0), state="running"), print):
        hold = "import sys, pathlib; from sdtrain.runs.lock import left_behind\nsys.exit(left_behind(pathlib.Path(sys.argv[1])))"
        assert (
            subprocess.run([sys.executable, "-c", hold, str(sweep / "d")], check=False).returncode
            == 0
        )  # asked by another process, it is there
    said = run_command(monkeypatch, capsys, sweep)
    assert (
        "not finished: b, killed at 200 images" in said
        and "not finished: c, running at 200 images" in said
    )


def test_the_page_needs_nothing_beside_it(write, monkeypatch, capsys):
    sweep = write("<b>bold", errors(16, 1.0)).parent
    write("d|e", errors(16, 1.2), config={"optimizer": {"lr": 0.02}})
    run_command(monkeypatch, capsys, sweep, "--output", sweep / "there")
    page = (sweep / "there" / "report.html").read_text()
    assert "<b>bold" not in page and "&lt;b&gt;bold" in page and "width=device-width" in page
    assert (
        set(re.findall(r'(?:src|href)="([^:"]*)', page)) == {"data"}
        and len(re.findall("data:image/png;base64", page)) == 3
    )
    text = (sweep / "there" / "report.md").read_text()
    assert (
        all((sweep / "there" / name).is_file() for name in re.findall(r"\]\(([^)]+)\)", text))
        and "| optimizer.lr | 0.002 | 0.02 |" in text
    )
    assert (
        "noise) alone: &lt;b>bold; d|e." in text
    )  # duplicates by their objective, whatever the learning rate


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("status.json", "[]"),
        ("status.json", "{"),
        ("status.json", "5"),
        ("config.yaml", "- 1"),
        ("config.yaml", "seed: 1"),
        (
            "metrics.jsonl",
            '{"images_seen": Infinity, "seconds": 1}\n{"images_seen": 1, "seconds": 1, "train/images_per_second": "x"}',
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
    ],
)
def test_a_run_that_is_odd_spoils_no_report(write, monkeypatch, capsys, file, content):
    sweep = write("a", errors(16, 1.0)).parent
    path = write("b", errors(16, 1.2), config={"x": 1}) / file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.encode("latin-1"))
    said = run_command(monkeypatch, capsys, sweep, sweep / "a", sweep / ".." / "sweep" / "b")
    assert (
        len(re.findall("^1. a: ", said, re.MULTILINE)) == 1
        and len(re.findall(r"^(2\. b|not finished: b|not compared: b)\b", said, re.MULTILINE)) == 1
    )


def test_a_look_of_another_shape_is_passed_over(write, monkeypatch, capsys):
    sweep = write("a", errors(16, 1.0)).parent
    path = write("b", errors(16, 1.2), config={"x": 1}) / "validation" / "000000000200.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pictures": ["one"]}))
    assert [len(run.validations) for run in find_runs([sweep])] == [2, 1]


def test_runs_of_one_name_are_told_apart(write, tmp_path):
    for place in ("one", "other"):
        shutil.copytree(write(f"run-{place}", errors(16, 1.0)), tmp_path / place / "shapes" / "now")
    assert [
        run.name for run in find_runs([tmp_path / "one/shapes/now", tmp_path / "other/shapes"])
    ] == ["one/shapes/now", "other/shapes/now"]


def test_a_run_of_code_that_is_not_ours_is_compared_all_the_same(write, monkeypatch, capsys):
    sweep = write("a", errors(16, 1.0)).parent
    write("b", errors(16, 1.2), config={"weighting": {"_target_": "os.abort"}})
    assert "2. b: " in run_command(monkeypatch, capsys, sweep)
    assert re.search(
        "b: its effective weight is not shown: .*os.abort",
        (sweep / "report" / "report.md").read_text(),
    )


def test_prompt_accuracy_stands_beside_the_number(write, monkeypatch, capsys):
    sweep = write("a", errors(16, 1.0)).parent
    write("b", errors(16, 1.2), config={"x": 1})
    (sweep / "b" / "evaluation").mkdir()
    found = {"trained": {"colour": 0.75}, "held_out": {"colour": 0.5}}
    (sweep / "b" / "evaluation" / "evaluation.json").write_text(
        json.dumps({"num_images": 4, "prompt_accuracy": found})
    )
    run_command(monkeypatch, capsys, sweep)
    assert re.search(
        r"\| b \|.*\| colour 75.0 % \|\n", (sweep / "report" / "report.md").read_text()
    )


def test_two_runs_part_where_their_losses_do(write, monkeypatch, capsys):
    sweep = write("a", errors(16, 1.0)).parent
    write("b", errors(16, 1.0))
    run_command(monkeypatch, capsys, sweep / "a", sweep / "b", "--output", sweep / "there")
    assert "never part" in (sweep / "there" / "report.md").read_text()
    lines = (sweep / "b" / "metrics.jsonl").read_text().splitlines()
    (sweep / "b" / "metrics.jsonl").write_text(
        "\n".join(lines[:2] + [lines[2].replace("0.005", "0.006")] + lines[3:]) + "\n"
    )
    run_command(monkeypatch, capsys, sweep / "a", sweep / "b", "--output", sweep / "there")
    assert "part at 200 images seen" in (sweep / "there" / "report.md").read_text()
    (sweep / "b" / "metrics.jsonl").write_text(
        "\n".join([lines[0].replace('"train/loss": 0.01', '"train/loss": null'), *lines[1:]]) + "\n"
    )
    run_command(monkeypatch, capsys, sweep / "a", sweep / "b", "--output", sweep / "there")
    assert "part at 100 images seen" in (sweep / "there" / "report.md").read_text()
    loss = lambda seen, value: (  # noqa: E731
        json.dumps({"images_seen": seen, "seconds": 1.0, "train/loss": value}) + "\n"
    )
    (sweep / "a" / "metrics.jsonl").write_text(loss(16, 1.0) + loss(32, 2.0) + loss(48, 4.0))
    (sweep / "b" / "metrics.jsonl").write_text(
        loss(32, 1.5) + loss(48, 4.0)
    )  # means over longer stretches of the same losses
    run_command(monkeypatch, capsys, sweep / "a", sweep / "b", "--output", sweep / "there")
    assert "never part, in 1 line " in (sweep / "there" / "report.md").read_text()
    (sweep / "b" / "metrics.jsonl").write_text("")
    run_command(monkeypatch, capsys, sweep / "a", sweep / "b", "--output", sweep / "there")
    assert "no line of the training loss" in (sweep / "there" / "report.md").read_text()


@pytest.mark.parametrize("words", [["nowhere"], ["{folder}"], ["{folder}/a", "--baseline", "z"]])
def test_what_holds_no_runs_is_said(write, tmp_path, monkeypatch, capsys, words):
    (tmp_path / "empty").mkdir()
    folder = tmp_path / "empty" if words == ["{folder}"] else write("a", errors(16, 1.0)).parent
    with pytest.raises(SystemExit) as left:
        run_command(monkeypatch, capsys, *(word.format(folder=folder) for word in words))
    assert left.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_quantiles_of_t():
    """Against tables: 30, 60 and 120 degrees of freedom."""
    assert (
        [round(t_quantile(n), 3) for n in (30, 60, 120)] == [2.042, 2.0, 1.98]
        and len(T) == 20
        and t_quantile(10**9) == pytest.approx(1.959964)
    )
    assert all(a > b for a, b in zip(T, T[1:], strict=False)) and math.isclose(
        t_quantile(21), 2.080, abs_tol=1e-3
    )
