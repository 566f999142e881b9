def test_numbers_side_by_side_are_of_the_same_pictures(write, errors, report):
    """b has seen 16 pictures more, which are harder; and a has no average of its weights."""
    more = errors(32, 1.0)
    more[16:] *= 5
    sweep = write("b", more, config={"x": 1}).parent
    folder = write("a", errors(16, 1.0), config={"x": 2})
    for path in folder.glob("validation/*.json"):
        record = json.loads(path.read_text())
        del record["errors"]["ema"]
        path.write_text(json.dumps(record))
    report(sweep)
    page = (sweep / "report" / "report.md").read_text()
    rows = [
        line.split("|")[6:9] for line in page.splitlines() if line.startswith(("| a |", "| b |"))
    ][:2]
    assert (
        rows[0] == rows[1]
        and "on the same 16 held-out pictures" in page
        and "Not all numbers are of averaged weights: a kept none" in page
    )


def test_prompt_accuracy_says_how_it_was_measured(write, errors, report):
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
    report(first.parent)
    page = (first.parent / "report" / "report.md").read_text()
    assert (
        "Prompt accuracy is of trained combinations: num_images 8, steps 50, ddim, last checkpoint."
        in page
        and "colour 50.0 %" in page
    )
    measured(second, 0.25, checkpoint="there/000000000100", steps=1)
    report(first.parent)
    page = (first.parent / "report" / "report.md").read_text()
    assert (
        "not measured alike" in page
        and "b: num_images 8, steps 1, ddim, checkpoint at 100 images" in page
    )


def test_two_runs_that_have_not_finished_are_told_by_what_they_train(write, errors, report):
    first = write("a", errors(16, 1.0), state="interrupted")
    weighting = {
        "weighting": {"_target_": "sdtrain.diffusion.weighting.min_snr.MinSNR", "gamma": 5.0}
    }
    second = write("b", errors(16, 1.0), state="running", config=weighting)
    report(first, second)
    assert "![effective_weights]" in (first / "report" / "report.md").read_text()


def test_what_differs_is_shown_where_it_differs():
    assert shown(["a" * 90 + "b", "a" * 90 + "c"]) == [
        "... " + "a" * 20 + "b",
        "... " + "a" * 20 + "c",
    ] and shown(["ab", "ac"]) == ["ab", "ac"]
    assert shown(["x" * 90, "y"]) == ["x" * 80 + " ...", "y"]


def test_samples_are_of_the_prompts_that_most_arms_have(write, errors):
    for name, prompt in (("a", "other"), ("b", "same"), ("c", "same")):
        folder = write(name, errors(16, {"a": 0.5, "b": 1.0, "c": 1.1}[name]), config={"x": name})
        (folder / "samples").mkdir()
        write_png(
            Image.new("RGB", (8, 8)),
            folder / "samples" / "pictures-000000200.png",
            {"requests": [{"prompt": prompt, "seed": 0}]},
        )
    sheet, without = figures.samples(compare(read(folder.parent)).arms)
    assert without == ["a"] and sheet is not None


def test_the_page_needs_nothing_beside_it(write, errors, report):
    sweep = write("<b>bold", errors(16, 1.0)).parent
    write("d|e", errors(16, 1.2), config={"optimizer": {"lr": 0.02}})
    report(sweep, "--output", sweep / "there")
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


def test_prompt_accuracy_stands_beside_the_number(write, errors, report):
    sweep = write("a", errors(16, 1.0)).parent
    write("b", errors(16, 1.2), config={"x": 1})
    (sweep / "b" / "evaluation").mkdir()
    found = {"trained": {"colour": 0.75}, "held_out": {"colour": 0.5}}
    (sweep / "b" / "evaluation" / "evaluation.json").write_text(
        json.dumps({"num_images": 4, "prompt_accuracy": found})
    )
    report(sweep)
    assert re.search(
        r"\| b \|.*\| colour 75.0 % \|\n", (sweep / "report" / "report.md").read_text()
    )


def test_two_runs_part_where_their_losses_do(write, errors, report):
    sweep = write("a", errors(16, 1.0)).parent
    write("b", errors(16, 1.0))
    report(sweep / "a", sweep / "b", "--output", sweep / "there")
    assert "never part" in (sweep / "there" / "report.md").read_text()
    lines = (sweep / "b" / "metrics.jsonl").read_text().splitlines()
    (sweep / "b" / "metrics.jsonl").write_text(
        "\n".join(lines[:2] + [lines[2].replace("0.005", "0.006")] + lines[3:]) + "\n"
    )
    report(sweep / "a", sweep / "b", "--output", sweep / "there")
    assert "part at 200 images seen" in (sweep / "there" / "report.md").read_text()
    (sweep / "b" / "metrics.jsonl").write_text(
        "\n".join([lines[0].replace('"train/loss": 0.01', '"train/loss": null'), *lines[1:]]) + "\n"
    )
    report(sweep / "a", sweep / "b", "--output", sweep / "there")
    assert "part at 100 images seen" in (sweep / "there" / "report.md").read_text()
    loss = lambda seen, value: (  # noqa: E731
        json.dumps({"images_seen": seen, "seconds": 1.0, "train/loss": value}) + "\n"
    )
    (sweep / "a" / "metrics.jsonl").write_text(loss(16, 1.0) + loss(32, 2.0) + loss(48, 4.0))
    (sweep / "b" / "metrics.jsonl").write_text(
        loss(32, 1.5) + loss(48, 4.0)
    )  # means over longer stretches of the same losses
    report(sweep / "a", sweep / "b", "--output", sweep / "there")
    assert "never part, in 1 line " in (sweep / "there" / "report.md").read_text()
    (sweep / "b" / "metrics.jsonl").write_text("")
    report(sweep / "a", sweep / "b", "--output", sweep / "there")
    assert "no line of the training loss" in (sweep / "there" / "report.md").read_text()
