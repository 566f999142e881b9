"""Which runs are compared, and what can be told of their differences."""

import json
import math
import re
from itertools import pairwise

import pytest
import torch

from sdtrain.errors import UserError
from sdtrain.evaluation.noise_level_error import BITS, LEVELS, bits_over
from sdtrain.report.compare import Arm, compare, difference, winners
from sdtrain.report.levels import error_by_level_section
from sdtrain.report.ranking import left_out_section, ranking_section, summary_lines
from sdtrain.report.statistics import (
    T_QUANTILES,
    Difference,
    standard_errors_to_95_percent,
    t_quantile,
)


def test_one_run_under_two_names_differs_by_exactly_nothing(write, errors, read):
    for name in ("a", "b"):
        write(name, errors(64, 1.0, own=0.1), config={"data": name})
    one, other = compare(read(write("c", errors(64, 1.0, own=0.1)).parent)).arms[:2]
    assert one.common_bits == other.common_bits
    differing = next(arm for arm in (one, other) if arm.difference is not None)
    assert differing.difference.mean == 0
    assert differing.difference.half_width == 0
    assert not differing.difference.is_significant


def test_a_difference_of_one_percent_shows_picture_by_picture_and_not_otherwise(
    write, errors, read
):
    """256 pictures, of which each is far harder or easier than another to both runs."""
    sweep = write("a", errors(256, 1.0, own=0.05)).parent
    write("b", errors(256, 1.01, seed=7, own=0.05), config={"x": 1})
    comparison = compare(read(sweep), "a")
    (found,) = [arm.difference for arm in comparison.arms if arm.difference]
    assert comparison.arms[0].name == "a"
    assert found.is_significant
    assert found.samples == "pictures"
    assert found.mean == pytest.approx(0.01 * comparison.arms[0].common_bits, rel=0.5)
    assert found.unpaired_half_width > abs(found.mean) > found.half_width


def test_the_interval_holds_what_it_says(errors):
    """Over 200 pairs of runs that are alike, it misses zero in about one of twenty."""
    arms = [Arm("", [], [], errors(64, 1.0, seed=number, own=0.2), 0, 0) for number in range(400)]
    missed = sum(difference(*arms[2 * i : 2 * i + 2], BITS).is_significant for i in range(200))
    assert 2 <= missed <= 20


@pytest.mark.parametrize("seeds", [2, 3])
def test_over_seeds_there_is_an_interval_from_three_on(write, errors, read, seeds):
    for seed in range(seeds):
        for name, scale in (("a", 1.0), ("b", 1.1)):
            sweep = write(
                f"arm={name},seed={seed}",
                errors(32, scale + 0.01 * seed, seed=seed, own=0.05),
                config={"seed": seed, "arm": name},
            ).parent
    comparison = compare(read(sweep), "arm=a,seed=0")
    assert [arm.name for arm in comparison.arms] == ["arm=a", "arm=b"]
    assert [len(arm.runs) for arm in comparison.arms] == [seeds, seeds]
    found = comparison.arms[1].difference
    assert found.samples == ("seeds" if seeds == 3 else "pictures")
    assert (found.seed_range is None) == (seeds == 3)
    assert comparison.arms[1].common_bits - comparison.arms[0].common_bits == pytest.approx(
        found.mean
    )


def test_arms_are_ranked_on_the_seeds_that_all_of_them_have(write, errors, read, text_of):
    """b has one seed, an easy one: on that seed it is the worse arm."""
    for seed, name, scale in ((0, "a", 0.5), (1, "a", 1.0), (2, "a", 1.0), (0, "b", 0.6)):
        sweep = write(
            f"arm={name},seed={seed}",
            errors(32, scale, own=0.01),
            config={"seed": seed, "arm": name},
        ).parent
    comparison = compare(read(sweep))
    assert [arm.name for arm in comparison.arms] == ["arm=a", "arm=b,seed=0"]
    assert comparison.arms[1].difference.mean > 0
    text = text_of(ranking_section(comparison))
    assert re.search(r"seeds that all arms have.*\b0\b.*arm=b,seed=0", text)


def test_a_seed_for_the_second_time_is_an_arm_of_its_own(write, errors, read):
    """Three runs of one configuration and seed are no three seeds; a difference is seen."""
    for name, scale in (("a", 1.0), ("b", 1.0), ("c", 1.1)):
        sweep = write(name, errors(16, scale)).parent
    comparison = compare(read(sweep))
    assert {arm.name: arm.difference and arm.difference.mean > 0 for arm in comparison.arms} == {
        "a": None,
        "b": False,
        "c": True,
    }


def test_seeds_alone_are_one_arm_that_says_how_many(write, errors, read):
    for number, scale in enumerate((1.0, 1.1, 1.2)):
        sweep = write(
            f"r{number}", errors(32, scale, seed=number, own=0.1), config={"seed": number}
        ).parent
    # With nothing else to compare, they are compared with each other.
    arms = compare(read(sweep)).arms
    assert [arm.name for arm in arms] == ["r0", "r1", "r2"]
    assert arms[1].difference.is_significant
    assert arms[1].difference.samples == "pictures"
    write("s0", errors(32, 2.0), config={"seed": 0, "arm": "s"})
    assert [arm.name for arm in compare(read(sweep)).arms] == ["r0 and 2 other seeds", "s0"]


def test_from_three_seeds_on_all_is_told_over_seeds(write, errors, read, text_of):
    """b is better on each picture, and with two seeds of three: over seeds nothing can be told."""
    for number, (mine, theirs) in enumerate(((1.0, 0.7), (1.0, 0.7), (1.0, 1.4))):
        sweep = write(
            f"arm=a,seed={number}", errors(64, mine, own=0.01), config={"seed": number, "arm": "a"}
        ).parent
        write(
            f"arm=b,seed={number}",
            errors(64, theirs, own=0.01),
            config={"seed": number, "arm": "b"},
        )
    comparison = compare(read(sweep), "arm=a")
    found = next(arm.difference for arm in comparison.arms if arm.difference)
    assert found.samples == comparison.samples == "seeds"
    assert not found.is_significant
    assert {name for _, name in winners(comparison)} == {None}
    # a is the same for all seeds: pairing gains nothing.
    assert found.unpaired_half_width == pytest.approx(found.half_width, rel=0.2)
    page = text_of(ranking_section(comparison), error_by_level_section(comparison))
    assert "no significant winner over seeds" in page
    assert "these trained networks" not in page
    one_seed = compare(read(sweep / "arm=a,seed=0", sweep / "arm=b,seed=0"))
    page = text_of(ranking_section(one_seed))
    assert re.search("over pictures .* these trained networks", page)


def test_seeds_that_disagree_tell_nothing(write, errors, read):
    for seed, scales in ((0, (1.0, 1.5)), (1, (1.0, 0.8))):
        for name, scale in zip("ab", scales, strict=True):
            sweep = write(
                f"arm={name},seed={seed}", errors(64, scale), config={"seed": seed, "arm": name}
            ).parent
    (found,) = [arm.difference for arm in compare(read(sweep), "arm=a").arms if arm.difference]
    assert found.seed_range[0] < 0 < found.seed_range[1]
    assert found.mean > found.half_width
    assert not found.is_significant
    assert {name for _, name in winners(compare(read(sweep)))} == {None}


def test_a_level_has_a_winner_where_it_can_be_told(write, errors, read):
    sweep = write("a", errors(16, 1.0, own=0.2)).parent
    write("b", torch.where(LEVELS < 0, 0.5, 1.0) * errors(16, 1.0, own=0.2), config={"x": 1})
    assert winners(compare(read(sweep))) == [
        (level, "b" if level < 0 else None) for level in range(-6, 8)
    ]


def test_ranks_on_what_all_reach(write, errors, read):
    sweep = write("wide", errors(16, 1.0), inside=(-12, 12)).parent
    write("narrow", errors(16, 1.0), inside=(-3, 4), config={"x": 1})
    comparison = compare(read(sweep))
    assert comparison.common_levels.tolist() == ((LEVELS >= -3) & (LEVELS <= 4)).tolist()
    assert comparison.arms[0].common_bits == comparison.arms[1].common_bits
    # Of a parabola the trapezoid rule makes 1/6 too much for each step.
    area = (LEVELS**2) @ bits_over(comparison.common_levels) * 2 * math.log(2)
    assert area.item() == pytest.approx((4**3 + 3**3) / 3 + 7 / 6)
    full = {arm.name: arm.runs[0].last_validation.result.summary() for arm in comparison.arms}
    assert full["wide"]["bits_per_dim"] < full["narrow"]["bits_per_dim"]
    assert full["wide"]["stand_in_share"] == 0 < full["narrow"]["stand_in_share"]


def test_what_is_worse_than_a_linear_denoiser_has_no_place(write, errors, read, text_of):
    """b saves less than nothing over its own levels, although it is the best on those that all
    reach; and the first arm is no baseline where it is untrained."""
    b = torch.where(LEVELS < 4, 0.1, 40.0) * errors(16, 1.0)
    sweep = write("b", b, config={"x": 1}, inside=(-6, 12)).parent
    write("c", errors(16, 1.0), config={"x": 2}, inside=(-6, 3))
    write("a", errors(16, 1.2), config={"x": 3}, inside=(-6, 3))
    for baseline, differences in ((None, {"a"}), ("b", {"a", "c"})):
        comparison = compare(read(sweep / "b", sweep / "c", sweep / "a"), baseline)
        assert comparison.baseline.name == (baseline or "c")
        assert [arm.name for arm in comparison.arms] == ["c", "a", "b"]
        untrained = comparison.arms[-1]
        assert untrained.is_untrained and untrained.common_bits < comparison.arms[0].common_bits
        assert {arm.name for arm in comparison.arms if arm.difference} == differences
    said = summary_lines(compare(read(sweep)))
    assert [line.partition(":")[0] for line in said[:3]] == ["1. c", "2. a", "untrained"]
    assert "+-" not in said[2]
    page = text_of(ranking_section(compare(read(sweep))))
    (row,) = re.findall(r"^\| b \|.*untrained.*", page, re.MULTILINE)
    assert "+-" not in row


def test_nothing_is_ranked_where_all_are_untrained(write, errors, summary_of):
    sweep = write("a", errors(16, 3.0)).parent
    write("b", errors(16, 4.0), config={"x": 1})
    said = summary_of(sweep)
    assert [line.partition(",")[0] for line in said[:2]] == ["untrained: a", "untrained: b"]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"inside": (8, 12)}, "fewer than two noise levels"),
        ({"looks": (100,), "seen": 200}, "was at 100 of 200 images"),
        ({"scale": math.nan}, "errors that are not finite"),
    ],
)
def test_what_has_no_number_to_compare_is_refused_with_the_reason(
    write, errors, summary_of, given, reason
):
    sweep = write("a", errors(16, 1.0)).parent
    seen = given.get("seen")
    settings = {key: value for key, value in given.items() if key not in ("seen", "scale")}
    odd = write("b", errors(16, given.get("scale", 0.5)), config={"x": 1}, **settings)
    write("c", errors(16, 0.9), config={"x": 2})
    if seen:
        (odd / "status.json").write_text(json.dumps({"state": "finished", "images_seen": seen}))
    said = "\n".join(summary_of(sweep))
    assert re.search(f"not compared: b, .*{reason}", said)
    assert re.search(r"^1\. c: ", said, re.MULTILINE)
    assert "nan" not in said


@pytest.mark.parametrize("state", ["diverged", "running"])
def test_a_baseline_that_cannot_be_compared_is_refused(write, errors, summary_of, state):
    sweep = write("a", errors(16, 1.0)).parent
    write("b", errors(16, 0.5), state=state)
    with pytest.raises(UserError, match=f"b cannot be compared: {state}") as refused:
        summary_of(sweep, baseline="b")
    assert refused.value.key == "--baseline"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"autoencoder": "b" * 64}, "autoencoder"),
        ({"latent_scale": 0.8}, "latent scale"),
        ({"variance": [1.1]}, "mean or variance"),
        ({"pictures": [f"q{i}" for i in range(16)]}, "validation pictures"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_the_reason(
    write, errors, read, text_of, change, reason
):
    sweep = write("a", errors(16, 1.0)).parent
    write("b", errors(16, 0.5), **change)
    write("c", errors(16, 0.9), state="diverged")
    write("d", errors(16, 0.9), config={"x": 1})
    comparison = compare(read(sweep))
    said = "\n".join(summary_lines(comparison))
    assert re.search(f"not compared: b, .*{reason}.* as a$", said, re.MULTILINE)
    assert "not finished: c, diverged at 200 images" in said
    assert re.search(r"^1\. d: ", said, re.MULTILINE)
    assert re.search(r"^2\. a: ", said, re.MULTILINE)
    page = text_of(left_out_section(comparison))
    assert "not finished: diverged, exit code 4" in page
    assert reason in page


def test_quantiles_of_t():
    """Against tables: 30, 60 and 120 degrees of freedom."""
    assert [round(t_quantile(n), 3) for n in (30, 60, 120)] == [2.042, 2.0, 1.98]
    assert len(T_QUANTILES) == 20
    assert t_quantile(10**9) == pytest.approx(1.959964)
    assert all(a > b for a, b in pairwise(T_QUANTILES))
    assert t_quantile(21) == pytest.approx(2.080, abs=1e-3)
    assert standard_errors_to_95_percent(3) == 4.303  # two degrees of freedom


def test_a_difference_is_significant_in_either_direction():
    for mean, half_width, significant in ((0.2, 0.1, True), (-0.2, 0.1, True), (-0.1, 0.2, False)):
        assert Difference(mean, half_width, "pictures").is_significant == significant
