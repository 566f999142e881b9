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
from pathlib import Path

import numpy as np
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image
from reading import BARE, newest, unfinished_by, with_values

from sdtrain.assemble.drawing import build_drawing
from sdtrain.assemble.load import load
from sdtrain.assemble.sample import sample_checkpoint
from sdtrain.assemble.subject import load_subject
from sdtrain.config.boundary import CONFIGURATION_ERRORS, as_user_error
from sdtrain.config.compose import compose_config, known_keys
from sdtrain.config.overrides import choose_options, prepare_arguments
from sdtrain.config.run_readers import check_evaluate, check_sample
from sdtrain.config.schema import SampleConfig
from sdtrain.errors import StorageError, UserError
from sdtrain.evaluation.evaluate import evaluate
from sdtrain.files import check_writable
from sdtrain.generation.sample import sample
from sdtrain.paths import find_folder
from sdtrain.runs.layout import CheckpointFolder, RunFolder
from sdtrain.runs.manifest import list_checkpoints
from sdtrain.runs.start import check_start
from sdtrain.training import first_stage  # noqa: F401  patched by `before`

PROMPT = """a "large" red star, [on] {blue}: it's 50% = ${x} \\ ok, 星 🎨"""
QUICK = ["num_images=1", "steps=2", "accelerator=cpu"]


def notes(path) -> dict:
    return json.loads(Image.open(path).text["sdtrain"])


@pytest.fixture(scope="module")
def label_run(train_tiny, tmp_path_factory):
    run = tmp_path_factory.mktemp("label") / "run"
    unseen = ["validation=none", "callbacks.samples.every=0", "trainer.max_images=8"]
    result = train_tiny(run, "model/conditioner=class_label", *unseen)
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
        "image_size": 32,
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


def test_a_picture_is_drawn_from_a_picture(here, tiny_run, tmp_path):
    """Strength 0 is the picture itself, as far as the autoencoder keeps it."""
    Image.new("RGB", (48, 64), (230, 40, 40)).save(tmp_path / "red.png")
    words = [f"checkpoint={tiny_run}", "prompt=a star", *QUICK, f"init_image={tmp_path}/red.png"]
    result = here("sdtrain-sample", *words, "strength=0", f"output={tmp_path}/out")
    assert result.code == 0, result.err
    drawn = tmp_path / "out" / "00000-seed0.png"
    with Image.open(drawn) as picture:
        mean = np.asarray(picture).mean((0, 1))
    assert abs(mean - (230, 40, 40)).max() < 40
    assert notes(drawn)["strength"] == 0 and notes(drawn)["init_image"] == f"{tmp_path}/red.png"
    before = (tmp_path / "red.png").read_bytes()
    result = here("sdtrain-sample", *words, f"output={tmp_path}")
    assert result.code == 2 and "output" in result.paragraph
    assert (tmp_path / "red.png").read_bytes() == before
    mask = Image.new("L", (48, 64), 0)
    mask.paste(255, (0, 0, 48, 32))
    mask.save(tmp_path / "mask.png")
    result = here("sdtrain-sample", *words, f"mask={tmp_path}/mask.png", f"output={tmp_path}/out")
    assert result.code == 0, result.err
    assert notes(drawn)["mask"] == f"{tmp_path}/mask.png" and notes(drawn)["strength"] == 1


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


# Others, which need no torch: tests/commands/test_before_torch.py.
SAMPLE_REFUSES = [
    (["checkpoint={run}"], "prompt", ""),
    (["checkpoint={folder}", "prompt=a star"], "checkpoint", "{folder}"),
    (["checkpoint={file}", "prompt=a star"], "checkpoint", "{file}"),
    (["checkpoint={run}/checkpoints/000000000007", "prompt=a star"], "checkpoint", "0007"),
    (["checkpoint={run}", "prompt=a star", "label=3"], "label", ""),
    (
        ["checkpoint={run}", "prompt=a star", "negative_prompt=red", "guidance_scale=1"],
        "negative_prompt",
        "",
    ),
    (["checkpoint={run}", "prompt=a star", "num_images=many"], "num_images", ""),
    (["checkpoint={run}", "prompt=a star", "steps=1001"], "steps", "1001"),
    (["checkpoint={run}", "prompt=a star", "sampler.eta=2"], "sampler.eta", "2"),
    (["checkpoint={run}", "prompt=a star", "image_size=[0,8]"], "image_size", "0"),
    (["checkpoint={run}", "prompt=a star", "image_size=[8,16,24]"], "image_size", "24"),
    (["checkpoint={run}", "prompt=a star", "autoencoder=nowhere"], "autoencoder", "nowhere"),
    (["checkpoint={label_run}"], "label", ""),
    (["checkpoint={label_run}", "label=48"], "label", ""),
    (["checkpoint={label_run}", "label=-1"], "label", ""),
    (["checkpoint={label_run}", "label=red"], "label", ""),
    (["checkpoint={label_run}", "prompt=a star"], "prompt", ""),
]


def test_sample_refuses(composed, tiny_run, label_run, tmp_path):
    """What the command calls with its configuration; a model is loaded once. Nothing is written."""
    models = {}

    def draw(config: SampleConfig) -> None:
        if config.autoencoder:
            sample_checkpoint(config)
        if config.checkpoint not in models:
            given = {"ema": True, "device": "cpu", "allow": [], "autoencoder": None}
            models[config.checkpoint] = load(CheckpointFolder(Path(config.checkpoint)), **given)
        loaded = models[config.checkpoint]
        drawing = build_drawing(vars(config), loaded.model.objective.schedule)
        file = loaded.checkpoint.config
        sample(config, loaded.model, drawing, loaded.image_size, config_file=file)

    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    names = {"run": tiny_run, "label_run": label_run}
    names |= {name: tmp_path / name for name in ("folder", "file")}
    for words, key, said in SAMPLE_REFUSES:
        given = [word.format(**names) for word in words]
        values = [*given, f"output={tmp_path}/out"]
        config = with_values(composed(config="sample"), *values)
        with pytest.raises(UserError) as refused:
            draw(check_sample(config, values))
        assert refused.value.exit_code == 2, words
        assert key in (refused.value.key or ""), (words, refused.value.key)
        assert said.format(**names) in str(refused.value), words
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize(
    ("words", "said"), [(["label=3"], "label"), (["output=''"], "output")], ids=["label", "output"]
)
def test_the_command_refuses_in_a_paragraph(here, tiny_run, tmp_path, words, said):
    typed = [f"checkpoint={tiny_run}", "prompt=a star", *words]
    result = here("sdtrain-sample", *typed, cwd=tmp_path)
    assert result.code == 2, result.err
    assert said in result.paragraph
    assert not list(tmp_path.iterdir())


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
    ("word", "said"),
    [
        ("metrics=[prompt_accuracy,beauty]", ["metrics", "beauty", "retrieval"]),
        ("metrics=retrival", ["metrics=retrival", "'retrieval'"]),
    ],
)
def test_evaluate_refuses_a_metric_that_does_not_exist(word, said):
    """As Hydra is asked by the command; in the command itself: test_before_torch.py."""
    with pytest.raises(CONFIGURATION_ERRORS) as refused:
        compose_config("evaluate", [choose_options(word)])
    error = as_user_error(refused.value, lambda: known_keys("evaluate"), [word])
    assert error.exit_code == 2 and all(part in str(error) for part in said), error


def refusal_of_evaluate(config: dict, *words: str) -> UserError:
    """With which the command's own calls end."""
    with pytest.raises(UserError) as refused:
        checked = check_evaluate(with_values(config, *words), words)
        evaluate(checked, lambda path: load_subject(checked, path))
    return refused.value


def test_evaluate_refuses(composed, tiny_run, label_run, tmp_path):
    cases = [
        ("[sampler_error]", ["metrics.sampler_error.steps=[]"], "metrics.sampler_error.steps", ""),
        ("[sampler_error]", ["steps=3"], "steps", "metrics.sampler_error.steps"),
        ("[retrieval]", ["metrics.retrieval.max_pictures=31"], "metrics=retrieval", "32"),
        ("[prompt_accuracy]", ["guidance_scale=strong"], "guidance_scale", ""),
        ("[prompt_accuracy]", ["+metrics.prompt_accuracy.k=3"], "metrics.prompt_accuracy.k", ""),
        (
            "[prompt_accuracy]",
            [f"checkpoint={label_run}", "steps=2"],
            "metrics",
            "metrics=prompt_accuracy",
        ),
    ]
    for metric, words, key, said in cases:
        config = composed(f"metric={metric}", config="evaluate")
        given = [f"checkpoint={tiny_run}", f"output={tmp_path}/out", *words]
        error = refusal_of_evaluate(config, *given)
        assert error.exit_code == 2 and key in str(error) and said in str(error), (words, error)
    assert not list(tmp_path.iterdir())


def test_evaluate_refuses_a_sampler_that_draws_anew_where_it_measures_its_error(
    composed, tiny_run, tmp_path
):
    config = composed("metric=[sampler_error]", "sampler=euler_ancestral", config="evaluate")
    error = refusal_of_evaluate(config, f"checkpoint={tiny_run}", "num_images=2")
    assert error.exit_code == 2 and "sampler=ddim" in str(error)
    assert "sampler euler_ancestral" in str(error)  # as it was typed


def test_evaluate_works_and_keeps_what_was_measured_before(here, tiny_run, tmp_path):
    words = [f"checkpoint={tiny_run}", f"output={tmp_path}/out"]
    steps = ["metrics.sampler_error.steps=[2,4,50]", "metrics.sampler_error.reference=8"]
    more = ["metrics=sampler_error", "num_images=2", *steps]
    assert here("sdtrain-evaluate", *words, *more).code == 0
    more = ["metrics=[prompt_accuracy,retrieval]", "num_images=4", "steps=2"]
    result = here("sdtrain-evaluate", *words, *more)
    assert result.code == 0, result.err
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    used = {metric: settings.get("steps") for metric, settings in written["settings"].items()}
    # The first has its own.
    assert used == {"sampler_error": None, "prompt_accuracy": 2, "retrieval": 2}
    assert written["prompt_accuracy"].keys() == {"trained", "held_out"}
    assert written["retrieval"]["chance"]["top_1"] == 1 / 32
    found = written["sampler_error"]
    assert found["mean"].keys() == {"2 steps", "4 steps"}
    assert 0 < found["mean"]["4 steps"] <= found["largest"]["4 steps"] < 1
    pictures = {"sampler_error.png", "sampler_error-curve.png", "retrieval.png"}
    pictures |= {"prompt_accuracy-held_out.png", "prompt_accuracy-trained.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"evaluation.json"} | pictures


@pytest.mark.parametrize("name", ["sdtrain-sample", "sdtrain-evaluate"])
def test_an_output_that_cannot_be_written_is_5(here, tiny_run, tmp_path, name):
    (tmp_path / "file").write_text("kept")
    output = f"{tmp_path}/file/out"
    words = ["prompt=a star", "num_images=1"] if name == "sdtrain-sample" else ["num_images=2"]
    result = here(name, f"checkpoint={tiny_run}", *words, "steps=2", f"output={output}")
    assert result.code == 5 and f"output={output}" in result.paragraph, result.err
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("place", ["{file}/out", "{file}", "/proc/out", "/proc"])
def test_folders_that_cannot_be_written(tmp_path, place):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(StorageError) as refused:
        check_writable(Path(place.format(file=tmp_path / "file")))
    assert refused.value.exit_code == 5 and refused.value.key == "output"
    assert (tmp_path / "file").read_text() == "kept"


def test_a_run_folder_that_cannot_be_written_is_5(here, tiny, tmp_path):
    (tmp_path / "file").touch()
    result = here("sdtrain", *tiny(), f"hydra.run.dir={tmp_path}/file/run")
    assert result.code == 5 and "hydra.run.dir" in result.paragraph, result.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_batch_larger_than_the_data_is_3(refused, planned, built, tiny_config):
    """As large as the data it may be."""
    error = refused(config=tiny_config("data.batch_size=33"))
    assert error.exit_code == 3 and error.key == "data.batch_size"
    assert "32 pictures" in str(error)
    parts = built(planned(config=tiny_config(*BARE, "data.batch_size=32")))
    batch = next(iter(parts.datamodule.train_dataloader()))
    assert batch.ordinal.tolist() == list(range(32))


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
def test_pictures_that_cannot_be_trained_on_are_3(refused, tiny_config, tmp_path, make, said):
    make(tmp_path / "pictures")
    words = ["data=images", "model/autoencoder=pixels", f"data.path={tmp_path}/pictures"]
    error = refused("model/autoencoder=pixels", config=tiny_config(*words))
    assert error.exit_code == 3 and said in str(error)


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
def test_what_the_second_stage_would_refuse_is_said_before_the_first(refused, tiny_config, word):
    """No picture is read for it."""
    error = refused(word, config=tiny_config("data=images", "data.path=/nowhere", word))
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


def test_resume_must_wants_something_before_a_first_stage_too(tmp_path):
    run = RunFolder(tmp_path / "run")
    (run.first_stage.checkpoints / "notes").mkdir(parents=True)
    with pytest.raises(UserError) as refused:
        check_start(run, "must", has_first_stage=True)
    assert refused.value.key == "resume" and "resume=must" in str(refused.value)
    (run.first_stage.checkpoints / f"{8:012d}").mkdir()
    check_start(run, "must", has_first_stage=True)
    with pytest.raises(UserError):
        check_start(run, "must", has_first_stage=False)


def test_a_folder_with_any_letters_reaches_the_first_stage(train_tiny, tmp_path, monkeypatch):
    """The command of the first stage, read as its own process would read it."""
    folder = tmp_path / "bé, [c] = 'd'"
    pictures(folder)
    (tmp_path / "python").write_text(
        f"#!/bin/sh\nprintf '%s\\0' \"$@\" > '{tmp_path}/seen'\n"
        f"echo $WANDB_NAME $WANDB_RUN_ID > '{tmp_path}/wandb'\nexit 7\n"
    )
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setenv("WANDB_RUN_ID", "of the run itself")
    monkeypatch.setenv("WANDB_NAME", "mine")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    result = train_tiny(tmp_path / "run", "data=images", f"data.path={folder}", "seed=3")
    assert result.code == 7
    seen = (tmp_path / "seen").read_text().split("\0")[1:-1]
    given = OverridesParser.create().parse_overrides(prepare_arguments(seen))
    words = {override.key_or_group: override.value() for override in given}
    assert words["data.path"] == str(folder)
    assert words["seed"] == 3
    assert words["hydra.run.dir"] == f"{tmp_path}/run/first_stage"
    assert words["trainer.accelerator"] == "cpu"
    assert words["experiment"] == "images_autoencoder"
    assert (tmp_path / "wandb").read_text() == "mine/first_stage\n"


def test_weights_that_are_not_the_run_s_are_refused(tiny_run, tmp_path):
    other = tmp_path / "autoencoder"
    shutil.copytree(find_folder("data/shapes_autoencoder", ""), other)
    file = next(other.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    checkpoint = CheckpointFolder(newest(tiny_run))
    with pytest.raises(UserError) as refused:
        load(checkpoint, ema=True, device="cpu", allow=[], autoencoder=str(other))
    assert refused.value.exit_code == 2 and "autoencoder" in refused.value.key
