"""The sections of a report, and the page that shows them."""

import json
import re

from PIL import Image

from sdtrain.pictures import write_png
from sdtrain.report.compare import compare
from sdtrain.report.configuration import configuration_section, shorten_around_difference
from sdtrain.report.loss_difference import first_loss_difference
from sdtrain.report.objectives import build_objectives, objectives_section
from sdtrain.report.page import render_html
from sdtrain.report.ranking import ranking_section
from sdtrain.report.samples import sample_sheet
from sdtrain.report.section import Picture, Section, Table
from sdtrain.runs.layout import RunFolder

SECTIONS = [
    "Ranking",
    "Error by noise level",
    "Bits per dimension during training",
    "Training objectives",
    "Differences in configuration",
    "Speed and memory",
    "Training losses of the two runs",
]
"""Of two runs that have drawn no pictures."""


def test_numbers_side_by_side_are_of_the_same_pictures(write, errors, read, text_of):
    """b has seen 16 pictures more, which are harder; and a has no average of its weights."""
    more = errors(32, 1.0)
    more[16:] *= 5
    sweep = write("b", more, config={"x": 1}).parent
    folder = write("a", errors(16, 1.0), config={"x": 2})
    for path in folder.glob("validation/*.json"):
        record = json.loads(path.read_text())
        del record["errors"]["ema"]
        path.write_text(json.dumps(record))
    text = text_of(ranking_section(compare(read(sweep))))
    rows = [line for line in text.splitlines() if line.startswith(("| a |", "| b |"))][:2]
    assert rows[0].split("|")[6:9] == rows[1].split("|")[6:9]
    assert "on the same 16 held-out pictures" in text
    assert "averaged weights: a." in text


def test_prompt_accuracy_says_how_it_was_measured(write, errors, read, text_of):
    def measured(folder, value, **how):
        settings = {
            "checkpoint": "there/000000000200",
            "num_images": 8,
            "steps": 50,
            "sampler": "sdtrain.samplers.ddim.ddim",
        } | how
        numbers = {
            "prompt_accuracy": {"trained": {"colour": value}},
            "settings": {"prompt_accuracy": settings},
        }
        evaluation = RunFolder(folder).evaluation
        evaluation.path.mkdir(exist_ok=True)
        evaluation.numbers.write_text(json.dumps(numbers))

    def text_now():
        return text_of(ranking_section(compare(read(first.parent))))

    first = write("a", errors(16, 1.0), config={"x": "a"})
    second = write("b", errors(16, 1.0), config={"x": "b"})
    measured(first, 0.5)
    measured(second, 0.25)
    text = text_now()
    how = "num_images 8, steps 50, sampler ddim, last checkpoint."
    assert f"Prompt accuracy is of trained combinations: {how}" in text
    assert "colour 50.0 %" in text
    measured(second, 0.25, checkpoint="there/000000000100", steps=1)
    text = text_now()
    assert "different settings" in text
    assert "b: num_images 8, steps 1, sampler ddim, checkpoint at 100 images" in text
    # Two ways of sampling that share a function are two; older records have its path alone.
    measured(second, 0.25, sampler={"name": "ddim", "eta": 0.5}, grid={"name": "karras", "rho": 7})
    text = text_now()
    assert "b: num_images 8, steps 50, sampler ddim eta=0.5, grid karras rho=7, last" in text


def test_prompt_accuracy_stands_beside_the_number(write, errors, read, text_of):
    sweep = write("a", errors(16, 1.0)).parent
    evaluation = RunFolder(write("b", errors(16, 1.2), config={"x": 1})).evaluation
    evaluation.path.mkdir()
    found = {"trained": {"colour": 0.75}, "held_out": {"colour": 0.5}}
    evaluation.numbers.write_text(json.dumps({"num_images": 4, "prompt_accuracy": found}))
    text = text_of(ranking_section(compare(read(sweep))))
    assert re.search(r"\| b \|.*\| colour 75.0 % \|\n", text)


def test_two_runs_that_have_not_finished_are_told_by_what_they_train(write, errors, read, text_of):
    min_snr = {"_target_": "sdtrain.diffusion.weighting.min_snr.MinSNR", "gamma": 5.0}
    first = write("a", errors(16, 1.0), state="interrupted")
    second = write("b", errors(16, 1.0), state="running", config={"weighting": min_snr})
    text = text_of(objectives_section(build_objectives(compare(read(first, second)))))
    assert "![effective_weights]" in text
    assert "Duplicates" not in text


def test_objectives_without_a_loss_are_compared(write, errors, read, text_of):
    """Of a version that had no such key: a square was meant."""
    v = {"_target_": "sdtrain.diffusion.prediction.V"}
    epsilon = {"_target_": "sdtrain.diffusion.weighting.epsilon.Epsilon"}
    for name, prediction in (("a", {}), ("b", {"prediction": v})):
        folder = write(
            name, errors(16, 1.0), config={"loss": None, "weighting": epsilon} | prediction
        )
    text = text_of(objectives_section(build_objectives(compare(read(folder.parent)))))
    assert "a: same objective with another prediction: b." in text


def test_what_differs_is_shown_where_it_differs():
    assert shorten_around_difference(["a" * 90 + "b", "a" * 90 + "c"]) == [
        "... " + "a" * 20 + "b",
        "... " + "a" * 20 + "c",
    ]
    assert shorten_around_difference(["ab", "ac"]) == ["ab", "ac"]
    assert shorten_around_difference(["x" * 90, "y"]) == ["x" * 80 + " ...", "y"]


def test_samples_are_of_the_prompts_that_most_arms_have(write, errors, read):
    for name, prompt, scale in (("a", "other", 0.5), ("b", "same", 1.0), ("c", "same", 1.1)):
        folder = write(name, errors(16, scale), config={"x": name})
        requests = {"requests": [{"prompt": prompt, "seed": 0}]}
        write_png(Image.new("RGB", (8, 8)), RunFolder(folder).pictures(200), requests)
    sheet, without = sample_sheet(compare(read(folder.parent)).arms)
    assert without == ["a"]
    assert sheet is not None


def test_the_page_needs_nothing_beside_it(write, errors, report, tmp_path, monkeypatch):
    write("a", errors(16, 1.0))
    write("d|e", errors(16, 1.2), config={"optimizer": {"lr": 0.02}})
    monkeypatch.setenv("HOME", str(tmp_path))
    report("~/sweep", "--output", "~/there")
    html = (tmp_path / "there" / "report.html").read_text()
    assert "width=device-width" in html
    assert set(re.findall(r'(?:src|href)="([^:"]*)', html)) == {"data"}
    assert len(re.findall("data:image/png;base64", html)) == 3
    text = (tmp_path / "there" / "report.md").read_text()
    for name in re.findall(r"\]\(([^)]+)\)", text):
        assert (tmp_path / "there" / name).is_file()
    assert re.findall("^## (.+)$", text, re.MULTILINE) == SECTIONS
    assert "| optimizer.lr | 0.002 | 0.02 |" in text
    # Duplicates by their objective, whatever the learning rate.
    assert re.search(r"^Duplicates .*: a; d\|e\.$", text, re.MULTILINE)


def test_a_name_is_no_html(write, errors, read, text_of):
    sweep = write("<script>alert(1)<&>", errors(16, 1.0)).parent
    write('d"e', errors(16, 1.2), config={"x": "<b>&amp;"})
    runs = read(sweep)
    sections = [ranking_section(compare(runs)), configuration_section(runs)]
    html = render_html("", sections)
    assert "<script" not in html
    assert "<b>" not in html
    assert "&lt;script&gt;alert(1)&lt;&amp;&gt;" in html
    assert "&lt;b&gt;&amp;amp;" in html
    text = text_of(*sections)
    assert "<script" not in text
    assert "&lt;script>" in text


def test_all_of_a_section_is_escaped():
    """Titles, heads, cells, paragraphs, names of pictures: in text and in attributes."""
    odd = "<script>\"&'"
    parts = [odd, Table([odd], [[odd]]), Picture(odd, Image.new("RGB", (2, 2)))]
    sections = [Section(odd, parts)]
    html = render_html(odd, sections)
    assert "<script" not in html
    assert html.count("&lt;script&gt;&#34;&amp;&#39;") == 7


def test_two_runs_part_where_their_losses_do(write, errors, read):
    first = RunFolder(write("a", errors(16, 1.0)))
    second = RunFolder(write("b", errors(16, 1.0)))

    def difference():
        return first_loss_difference(*read(first.path, second.path))

    def loss(seen, value):
        return json.dumps({"images_seen": seen, "seconds": 1.0, "train/loss": value}) + "\n"

    assert difference() == (2, None)
    lines = second.metrics.read_text().splitlines(keepends=True)
    changed = lines[2].replace("0.005", "0.006")
    second.metrics.write_text("".join([*lines[:2], changed, *lines[3:]]))
    assert difference() == (2, 200)
    no_loss = lines[0].replace('"train/loss": 0.01', '"train/loss": null')
    second.metrics.write_text("".join([no_loss, *lines[1:]]))
    assert difference() == (2, 100)
    # Means over longer stretches of the same losses.
    first.metrics.write_text(loss(16, 1.0) + loss(32, 2.0) + loss(48, 4.0))
    second.metrics.write_text(loss(32, 1.5) + loss(48, 4.0))
    assert difference() == (1, None)
    second.metrics.write_text("")
    assert difference() == (0, None)
