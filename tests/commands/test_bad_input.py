"""What people get wrong with files, folders, prompts and checkpoints: one paragraph that names the
key, its code, nothing half-written.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
import time

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image
from reading import BARE, unfinished_by, with_values

from sdtrain.config.overrides import prepare_arguments
from sdtrain.paths import find_folder
from sdtrain.runs.manifest import list_checkpoints
from sdtrain.training import first_stage  # noqa: F401  patched by `before`

PROMPT = """a "large" red star, [on] {blue}: it's 50% = ${x} \\ ok, 星 🎨"""
QUICK = ["num_images=1", "steps=2", "accelerator=cpu"]


def notes(path) -> dict:
    return json.loads(Image.open(path).text["sdtrain"])


@pytest.fixture(scope="module")
def label_run(here, tiny, tmp_path_factory):
    run = tmp_path_factory.mktemp("label") / "run"
    unseen = ["validation=none", "callbacks.samples.every=0", "trainer.max_images=8"]
    words = tiny("model/conditioner=class_label", *unseen)
    result = here("sdtrain", *words, f"hydra.run.dir={run}")
    assert result.code == 0, result.err
    return run


def test_any_prompt_works(here, tiny_run, tmp_path):
    file = tmp_path / "prompts, of mine.txt"
    file.write_text("\ufeffa ring, red\n\n  a 'blue' cross  \n", encoding="utf-8")
    prompts = [
        f"prompt={PROMPT}",
        "prompt=a green ring",
        f"prompt_file={file}",
        "negative_prompt=green, [grey]",
    ]
    words = [
        "seed=5",
        "num_images=2",
        "steps=2",
        "accelerator=cpu",
        f"output={tmp_path}/a, b = [c]",
    ]
    result = here("sdtrain-sample", f"checkpoint={tiny_run}", *prompts, *words)
    assert result.code == 0, result.err
    written = sorted((tmp_path / "a, b = [c]").iterdir())
    assert [path.name for path in written] == [f"{i:05d}-seed{5 + i % 2}.png" for i in range(8)] + [
        "grid.png"
    ]
    assert [notes(path)["prompt"] for path in written[:8:2]] == [
        PROMPT,
        "a green ring",
        "a ring, red",
        "a 'blue' cross",
    ]
    assert notes(written[1]) == {
        "prompt": PROMPT,
        "negative_prompt": "green, [grey]",
        "seed": 6,
        "steps": 2,
        "guidance_scale": 3.0,
        "ema": True,
        "sampler": {"name": "ddim", "eta": 0.0},
        "grid": {"name": "trailing"},
        "guidance": notes(written[-1])["guidance"],
        "checkpoint": str(list_checkpoints(tiny_run)[-1]),
        "config_sha256": hashlib.sha256((tiny_run / "config.yaml").read_bytes()).hexdigest(),
    }
    assert notes(written[-1])["guidance"]["name"] == "classifier_free"


@pytest.mark.slow
def test_any_prompt_works_in_the_command_itself(command, tiny_run, tmp_path):
    result = command(
        "sdtrain-sample",
        f"checkpoint={tiny_run}",
        f"prompt={PROMPT}",
        *QUICK,
        "output=out",
        cwd=tmp_path,
    )
    assert result.code == 0, result.err
    assert notes(tmp_path / "out" / "00000-seed0.png")["prompt"] == PROMPT
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_takes_any_folder_and_name(here, tiny, tmp_path):
    name = "a, [b]: 'c' = \"d\" é"
    words = tiny(*BARE, "trainer.max_images=8", f"name={name}")
    result = here("sdtrain", *words, cwd=tmp_path)
    assert result.code == 0, result.err
    (run,) = (tmp_path / "runs" / name).iterdir()
    assert list_checkpoints(run)
    asked = [f"checkpoint={run}", "prompt=a star", "ema=false", *QUICK]
    result = here("sdtrain-sample", *asked, f"output={tmp_path}/out")
    assert result.code == 0, result.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["checkpoint={run}"], "prompt"),
        (["checkpoint={run}", "prompt=null"], "prompt"),
        (["prompt=a star"], "checkpoint"),
        (["checkpoint=nowhere", "prompt=a star"], "checkpoint=nowhere"),
        (["checkpoint={folder}", "prompt=a star"], "checkpoint={folder}"),
        (["checkpoint={file}", "prompt=a star"], "checkpoint={file}"),
        (["checkpoint={run}/checkpoints/000000000007", "prompt=a star"], "checkpoint="),
        (["checkpoint={run}", "prompt_file=nowhere.txt"], "prompt_file=nowhere.txt"),
        (["checkpoint={run}", "prompt=a star", "label=3"], "label"),
        (
            ["checkpoint={run}", "prompt=a star", "negative_prompt=red", "guidance_scale=1"],
            "negative_prompt",
        ),
        (["checkpoint={run}", "prompt=a star", "output=''"], "output"),
        (["checkpoint={run}", "prompt=a star", "num_images=0"], "num_images=0"),
        (["checkpoint={run}", "prompt=a star", "num_images=many"], "num_images"),
        (["checkpoint={run}", "prompt=a star", "steps=0"], "steps=0"),
        (["checkpoint={run}", "prompt=a star", "steps=1001"], "steps=1001"),
        (["checkpoint={run}", "prompt=a star", "sampler=dimm"], "sampler=dimm"),
        (["checkpoint={run}", "prompt=a star", "sampler=none"], "sampler"),
        (["checkpoint={run}", "prompt=a star", "sampler.eta=2"], "sampler.eta=2"),
        (["checkpoint={run}", "prompt=a star", "accelerator=tpu"], "accelerator"),
        (["checkpoint={run}", "prompt=a star", "numimages=2"], "num_images"),
        (["checkpoint={run}", "prompt=a star", "autoencoder=nowhere"], "nowhere"),
        (["checkpoint={label_run}"], "label"),
        (["checkpoint={label_run}", "label=48"], "label"),
        (["checkpoint={label_run}", "label=-1"], "label"),
        (["checkpoint={label_run}", "label=red"], "label"),
        (["checkpoint={label_run}", "prompt=a star"], "prompt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_sample_refuses(here, tiny_run, label_run, tmp_path, words, said):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    names = {
        "run": tiny_run,
        "label_run": label_run,
        "folder": tmp_path / "folder",
        "file": tmp_path / "file",
    }
    result = here(
        "sdtrain-sample",
        *(word.format(**names) for word in words),
        f"output={tmp_path}/out",
        cwd=tmp_path,
    )
    assert result.code == 2, result.err
    assert said.format(**names) in result.paragraph
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_label_is_drawn(here, label_run, tmp_path):
    result = here(
        "sdtrain-sample",
        f"checkpoint={label_run}",
        "label=[3,47]",
        *QUICK,
        f"output={tmp_path}/out",
    )
    assert result.code == 0 and [
        notes(path)["label"] for path in sorted((tmp_path / "out").glob("0*.png"))
    ] == [3, 47]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["metrics=beauty"], ["metrics", "prompt_accuracy", "retrieval"]),
        (["metrics=[prompt_accuracy,beauty]"], ["metrics", "beauty", "retrieval"]),
        (["metrics=retrival"], ["metrics=retrival", "'retrieval'"]),
        (["metrics=[]"], ["metrics"]),
        (["metrics=sampler_error", "metrics.sampler_error.steps=[]"], ["sampler_error.steps"]),
        (["metrics=retrieval", "metrics.retrieval.max_pictures=63"], ["metrics=retrieval", "64"]),
        (["metrics=retrieval", "+metrics.retrieval.k=3"], ["metrics.retrieval.k"]),
        (["num_images=0"], ["num_images=0"]),
        (["guidance_scale=strong"], ["guidance_scale"]),
    ],
    ids=" ".join,
)
def test_evaluate_refuses(here, tiny_run, tmp_path, words, said):
    result = here("sdtrain-evaluate", f"checkpoint={tiny_run}", *words, f"output={tmp_path}/out")
    assert result.code == 2 and all(part in result.paragraph for part in said), result.err
    assert not list(tmp_path.iterdir())


def test_evaluate_refuses_a_model_that_reads_no_captions(here, label_run, tmp_path):
    result = here(
        "sdtrain-evaluate", f"checkpoint={label_run}", f"output={tmp_path}/out", "steps=2"
    )
    assert result.code == 2 and "metrics=prompt_accuracy" in result.paragraph
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_evaluate_works(here, tiny_run, tmp_path):
    result = here(
        "sdtrain-evaluate",
        f"checkpoint={tiny_run}",
        "metrics=[prompt_accuracy,retrieval]",
        "num_images=4",
        "steps=2",
        f"output={tmp_path}/out",
    )
    assert result.code == 0, result.err
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (
        written["prompt_accuracy"].keys() == {"trained", "held_out"}
        and written["retrieval"]["chance"]["top_1"] == 1 / 64
    )
    pictures = {"prompt_accuracy-held_out.png", "prompt_accuracy-trained.png", "retrieval.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"evaluation.json"} | pictures


def test_evaluate_measures_how_many_steps_it_takes(here, tiny_run, tmp_path):
    steps = ["metrics.sampler_error.steps=[2,4,50]", "metrics.sampler_error.reference=8"]
    words = [f"checkpoint={tiny_run}", "num_images=2", f"output={tmp_path}/out"]
    assert here("sdtrain-evaluate", *words, "metrics=sampler_error", *steps).code == 0
    assert here("sdtrain-evaluate", *words, "steps=2").code == 0  # what was measured before stays
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    found = written["sampler_error"]
    used = {metric: settings.get("steps") for metric, settings in written["settings"].items()}
    assert used == {"sampler_error": None, "prompt_accuracy": 2}  # the former has its own
    result = here("sdtrain-evaluate", *words, "metrics=sampler_error", "steps=3")
    assert result.code == 2 and "metrics.sampler_error.steps" in result.paragraph
    assert found["mean"].keys() == {"2 steps", "4 steps"}
    assert 0 < found["mean"]["4 steps"] <= found["largest"]["4 steps"] < 1
    drawn = {path.name for path in (tmp_path / "out").glob("sampler*.png")}
    assert drawn == {"sampler_error.png", "sampler_error-curve.png"}
    result = here("sdtrain-evaluate", *words, "metrics=sampler_error", "sampler=euler_ancestral")
    assert result.code == 2 and "sampler=ddim" in result.paragraph
    assert "sampler euler_ancestral" in result.paragraph  # as it was typed


@pytest.mark.parametrize("name", ["sdtrain-sample", "sdtrain-evaluate"])
@pytest.mark.parametrize("place", ["{file}/out", "{file}", "/proc/out"])
def test_an_output_that_cannot_be_written_is_5(here, tiny_run, tmp_path, name, place):
    (tmp_path / "file").write_text("kept")
    output = place.format(file=tmp_path / "file")
    words = ["prompt=a star", "num_images=1"] if name == "sdtrain-sample" else ["num_images=2"]
    result = here(name, f"checkpoint={tiny_run}", *words, "steps=2", f"output={output}")
    assert result.code == 5 and f"output={output}" in result.paragraph, result.err
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("place", ["{file}/run", "/proc/run"])
def test_a_run_folder_that_cannot_be_written_is_5(here, tiny, tmp_path, place):
    (tmp_path / "file").touch()
    result = here("sdtrain", *tiny(), f"hydra.run.dir={place.format(file=tmp_path / 'file')}")
    assert result.code == 5 and "hydra.run.dir" in result.paragraph, result.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_batch_larger_than_the_data_is_3(here, tiny, tmp_path):
    """As large as the data it may be."""
    result = here("sdtrain", *tiny("data.batch_size=65"), f"hydra.run.dir={tmp_path}/run")
    assert result.code == 3
    assert "data.batch_size=65" in result.paragraph and "64 pictures" in result.paragraph
    assert not (tmp_path / "run").exists()
    words = tiny(*BARE, "data.batch_size=64")
    assert here("sdtrain", *words, f"hydra.run.dir={tmp_path}/again").code == 0


def pictures(folder, captions=True, count=20):
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (40, 36), (5 * i, 0, 100)).save(folder / f"{i}.png")
        if captions:
            (folder / f"{i}.txt").write_text("a colour")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: None, "data.path"),
        (lambda folder: folder.mkdir(), "data.path"),
        (lambda folder: (pictures(folder), (folder / "7.png").write_bytes(b"no picture")), "7.png"),
        (lambda folder: pictures(folder, captions=False), "caption"),
    ],
    ids=["no folder", "empty", "unreadable", "no caption"],
)
def test_pictures_that_cannot_be_trained_on_are_3(here, tiny, tmp_path, make, said):
    make(tmp_path / "pictures")
    words = ["data=images", f"data.path={tmp_path}/pictures", "model/autoencoder=pixels"]
    result = here("sdtrain", *tiny(*words), f"hydra.run.dir={tmp_path}/run")
    assert result.code == 3 and said in result.paragraph, result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "word",
    [
        "optimizer.lr=-1",
        "optimizer.weight_decay=-0.1",
        "trainer.max_images=-8",
        "lr_schedule.warmup_images=-1",
        "callbacks.samples.num_images=0",
        "checkpoint.keep=1",
        "trainer.devices=2",
        "trainer.accumulate=3",
        "validation.num_images=0",
        "steps=0",
    ],
)
def test_what_the_second_stage_would_refuse_is_said_before_the_first(
    refused, composed, tiny, tmp_path, word
):
    """No picture is read for it."""
    cfg = composed(*tiny("data=images", f"data.path={tmp_path}/nowhere"))
    error = refused(word, config=with_values(cfg, word))
    assert error.exit_code == 2 and word.partition("=")[0] in str(error)


@pytest.mark.slow
def test_what_a_first_stage_refuses_is_said_once(command, tiny, tmp_path):
    result = command(
        "sdtrain",
        *tiny("data=images", f"data.path={tmp_path}/nowhere"),
        f"hydra.run.dir={tmp_path}/run",
    )
    assert result.code == 3 and "data.path" in result.paragraph, result.err


@pytest.mark.slow
def test_a_small_folder_trains_in_both_stages(command, tiny, tmp_path):
    pictures(tmp_path / "pictures")
    words = [
        "data=images",
        f"data.path={tmp_path}/pictures",
        "first_stage.max_images=32",
        "trainer.max_images=16",
    ]
    result = command("sdtrain", *tiny(*words), f"hydra.run.dir={tmp_path}/run")
    assert result.code == 0, result.err


@pytest.mark.slow
def test_a_first_stage_can_be_interrupted(start, tiny, tmp_path):
    """It is in a session of its own: of a group that gets a signal the run alone hears of it."""
    pictures(tmp_path / "pictures", count=40)
    run = tmp_path / "run"
    running = start(
        "sdtrain",
        *tiny("data=images", f"data.path={tmp_path}/pictures", "first_stage.max_images=1000000"),
        f"hydra.run.dir={run}",
    )
    stage = run / "first_stage" / "status.json"
    running.until(lambda: stage.exists() and json.loads(stage.read_text())["state"] == "running")
    try:
        os.killpg(running.pid, signal.SIGTERM)
        running.until(lambda: json.loads(stage.read_text())["state"] == "interrupted", 120)
        assert running.wait().code == 143
        assert json.loads((run / "status.json").read_text())["state"] == "interrupted"
    finally:
        left = json.loads(stage.read_text())
        if left["state"] == "running":
            os.kill(left["pid"], signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("bound", [True, False])
def test_a_first_stage_ends_with_its_parent_and_is_gone_on_with(
    start, here, tiny, tmp_path, monkeypatch, bound
):
    """Killed without a word. And the twin: unbound, it trains on, and nobody may go on with it."""
    pictures(tmp_path / "pictures", count=40)
    run = tmp_path / "runs" / "images" / "now"
    words = tiny("data=images", f"data.path={tmp_path}/pictures", "first_stage.max_images=1000000")
    unbound = f"{__file__}:setattr(first_stage, 'stop_with_parent', None)"
    running = start("sdtrain", *words, f"hydra.run.dir={run}", before="" if bound else unbound)
    stage = run / "first_stage" / "status.json"
    running.until(lambda: stage.exists() and json.loads(stage.read_text())["state"] == "running")
    pid = json.loads(stage.read_text())["pid"]
    try:
        os.kill(running.pid, signal.SIGKILL)
        assert running.wait().code == -signal.SIGKILL
        if not bound:
            time.sleep(2)
            os.kill(pid, 0)
            return
        running.until(lambda: json.loads(stage.read_text())["state"] == "interrupted", 60)
        monkeypatch.chdir(tmp_path)
        assert unfinished_by(words) == run
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_first_stage_that_is_killed_is_said(start, tiny, tmp_path):
    pictures(tmp_path / "pictures", count=40)
    run = tmp_path / "run"
    running = start(
        "sdtrain",
        *tiny("data=images", f"data.path={tmp_path}/pictures", "first_stage.max_images=1000000"),
        f"hydra.run.dir={run}",
    )
    stage = run / "first_stage" / "status.json"
    running.until(lambda: stage.exists() and json.loads(stage.read_text())["state"] == "running")
    os.kill(json.loads(stage.read_text())["pid"], signal.SIGKILL)
    result = running.wait()
    assert (
        result.code == 2
        and "killed by SIGKILL" in result.paragraph
        and "resume=auto" in result.paragraph
    )
    assert json.loads((run / "status.json").read_text())["state"] == "failed"


def test_resume_must_wants_something_before_a_first_stage_too(here, tiny, tmp_path):
    pictures(tmp_path / "pictures")
    result = here(
        "sdtrain",
        *tiny("data=images", f"data.path={tmp_path}/pictures", "resume=must"),
        f"hydra.run.dir={tmp_path}/run",
    )
    assert (
        result.code == 2
        and "resume=must" in result.paragraph
        and not (tmp_path / "run" / "first_stage").exists()
    )


def test_a_folder_with_any_letters_reaches_the_first_stage(here, tiny, tmp_path, monkeypatch):
    """The command of the first stage, read as its own process would read it."""
    folder = tmp_path / "bé, [c] = 'd'"
    pictures(folder)
    (tmp_path / "python").write_text(
        f"#!/bin/sh\nprintf '%s\\0' \"$@\" > '{tmp_path}/seen'\n"
        f"echo $WANDB_NAME $WANDB_RUN_ID > '{tmp_path}/wandb'\nexit 7\n"
    )
    monkeypatch.setenv("WANDB_RUN_ID", "of the run itself")
    monkeypatch.setenv("WANDB_NAME", "mine")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    result = here(
        "sdtrain",
        *tiny("data=images", f"data.path={folder}", "seed=3"),
        f"hydra.run.dir={tmp_path}/run",
    )
    assert result.code == 7
    seen = (tmp_path / "seen").read_text().split("\0")[1:-1]
    words = {
        o.key_or_group: o.value()
        for o in OverridesParser.create().parse_overrides(prepare_arguments(seen))
    }
    assert (
        words["data.path"] == str(folder)
        and words["seed"] == 3
        and words["hydra.run.dir"] == f"{tmp_path}/run/first_stage"
    )
    assert words["trainer.accelerator"] == "cpu" and words["experiment"] == "images_autoencoder"
    assert (tmp_path / "wandb").read_text() == "mine/first_stage\n"


def test_weights_that_are_not_the_run_s_are_refused(here, tiny_run, tmp_path):
    other = tmp_path / "autoencoder"
    shutil.copytree(find_folder("data/shapes_autoencoder", ""), other)
    file = next(other.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    result = here(
        "sdtrain-sample",
        f"checkpoint={tiny_run}",
        "prompt=a star",
        *QUICK,
        f"autoencoder={other}",
        f"output={tmp_path}/out",
    )
    assert (
        result.code == 2 and "autoencoder" in result.paragraph and not (tmp_path / "out").exists()
    )
