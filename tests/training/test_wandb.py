"""What wandb gets of a run, read back from what it wrote."""

import json
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import wandb
from PIL import Image
from reading import lines, newest

from sdtrain.errors import UserError
from sdtrain.training.loggers.media import check_logger
from sdtrain.training.loggers.wandb import wandb_run_id
from sdtrain.training.loggers.wandb_variables import with_variables

PROMPTS = [
    "a large red circle on a green background",
    "a large green square on an orange background",
]

TYPED = [
    "logger.notes='a, longer: text'",
    "logger.tags=[one,two]",
    "logger.job_type=train",
    "logger.mode=offline",
    "logger.log_checkpoint=last",
]
VARIABLES = {
    "WANDB_PROJECT": "of the environment",
    "WANDB_ENTITY": "team",
    "WANDB_NAME": "shown name",
    "WANDB_RUN_GROUP": "together",
    "WANDB_RUN_ID": "given-id",
    "WANDB_NOTES": "what was typed holds",
    "WANDB_TAGS": "what was typed holds",
    "WANDB_MODE": "disabled",
    "WANDB__STATS_SAMPLING_INTERVAL": "0.1",
}

CLOCKS = {"config", "telemetry", "start_time", "host"}


def wandb_records(run) -> tuple[Path, list[dict], list[dict]]:
    """(folder, history items, all records) of the only offline run below `run`."""
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    wandb = str(Path(sysconfig.get_path("scripts")) / "wandb")
    inspect = [wandb, "leet", "inspect", "--json", str(file)]
    printed = subprocess.run(inspect, capture_output=True, text=True, check=True).stdout
    records = [json.loads(line) for line in printed.splitlines()]
    items = [record["history"]["item"] for record in records if "history" in record]
    return file.parent, items, records


@pytest.fixture(scope="module")
def wandb_run(here, tiny, tmp_path_factory):
    """(folder, stdout, wandb's folder, history items, all records) of a run with logger=wandb."""
    run = tmp_path_factory.mktemp("wandb") / "run"
    words = tiny("logger=wandb", "guidance_scale=2.5", *TYPED)
    with pytest.MonkeyPatch.context() as environment:
        for name, value in VARIABLES.items():
            environment.setenv(name, value)
        result = here("sdtrain", *words, f"hydra.run.dir={run}", cwd=run.parent)
    wandb.teardown()  # the process that writes it
    assert result.code == 0, result.err
    return run, result.out, *wandb_records(run)


def test_wandb_offline_is_reported_in_one_line(wandb_run):
    run, out, folder, _, records = wandb_run
    (line,) = [line for line in out.splitlines() if "offline" in line]
    (look, leet), (upload, pattern) = re.findall(r"`wandb (\w+) ([^`]+)`", line)
    assert (look, leet, upload) == ("leet", str(folder), "sync")
    assert list(run.glob(str(Path(pattern).relative_to(run)))) == [folder]
    exits = [record["exit"]["exit_code"] for record in records if "exit" in record]
    assert exits == [0]
    run_id = (run / "wandb" / "id").read_text()
    assert run_id == VARIABLES["WANDB_RUN_ID"]
    assert folder.name.endswith(f"-{run_id}")
    assert {record["run"]["run_id"] for record in records if "run" in record} == {run_id}


def test_wandb_leaves_one_folder_in_the_run(wandb_run):
    assert {path.name for path in wandb_run[0].iterdir()} == {
        "wandb",
        "checkpoints",
        "samples",
        "metrics.jsonl",
        "config.yaml",
        "status.json",
        "data.json",
        "parts",
    }


def holding(run, word: bytes) -> list[Path]:
    """wandb's files that hold the word."""
    files = [path for path in (run / "wandb").rglob("*") if path.is_file()]
    return [path for path in files if word in path.read_bytes()]


def test_wandb_does_not_hold_the_command_line(wandb_run):
    run = wandb_run[0]
    assert not holding(run, b"hydra.run.dir=") and holding(run, b"guidance_scale")


ASIDE = """
import sys
from pathlib import Path
import wandb
from sdtrain.training.loggers import media
from sdtrain.training.loggers import wandb as loggers

settings = wandb.Settings
wandb.Settings = lambda **given: settings(**given | {"x_disable_meta": False})
logger = loggers.wandb(
    project="sdtrain", mode="offline", run_dir=Path(sys.argv[1]), name="aside", resumed=0
)
media.close_logger(logger, failed=False)
"""


@pytest.mark.slow
def test_left_to_itself_it_would(tmp_path):
    """The twin."""
    script = tmp_path / "aside.py"
    script.write_text(ASIDE)
    subprocess.run([sys.executable, script, tmp_path, "hydra.run.dir=typed"], check=True)
    assert holding(tmp_path, b"hydra.run.dir=")


def test_wandb_holds_every_number(wandb_run, tiny_run):
    run, _, _, items, _ = wandb_run
    keys = [(line["images_seen"], sorted(line)) for line in lines(run)]
    assert keys == [(line["images_seen"], sorted(line)) for line in lines(tiny_run)]
    for line in lines(run):
        lists = {key: value for key, value in line.items() if isinstance(value, list)}
        numbers = {key: line[key] for key in line.keys() - lists.keys() - {"seconds"}}
        assert [item for item in items if numbers.items() <= item.items()], line
        wanted = {"images_seen": line["images_seen"]}
        for key, values in lists.items():
            wanted[f"{key}.values"] = [value or 0 for value in values]
        assert [item for item in items if wanted.items() <= item.items()], line
    logged = set().union(*items)
    assert {"train/loss", "train/lr", "train/images_per_second", "validation/loss"} <= logged


def test_wandb_holds_the_resolved_configuration(wandb_run):
    (config,) = [record["config"]["update"] for record in wandb_run[4] if "config" in record]
    assert config["schedule"] == {
        "_target_": "sdtrain.schedules.scaled_linear.scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "num_timesteps": 1000,
    }
    assert config["model"]["unet"]["context_dim"] == 16
    assert config["guidance_scale"] == 2.5
    assert len(config["model"]["autoencoder"]["sha256"]) == 64


def test_wandb_is_told_what_was_typed_and_what_the_environment_says(wandb_run):
    (told,) = [record["run"] for record in wandb_run[4] if "run" in record]
    assert {key: told[key] for key in told.keys() - CLOCKS} == {
        "run_id": "given-id",
        "project": "of the environment",
        "entity": "team",
        "display_name": "shown name",
        "run_group": "together",
        "notes": "a, longer: text",
        "tags": ["one", "two"],
        "job_type": "train",
        "resume": True,
    }


def test_wandb_measures_the_machine(wandb_run):
    measured = [record["stats"]["item"] for record in wandb_run[4] if "stats" in record]
    assert any("proc.memory.rssMB" in item for item in measured)


def test_wandb_holds_the_last_checkpoint(wandb_run):
    run, _, _, _, records = wandb_run
    artifacts = [record["artifact"] for record in records if "artifact" in record]
    (artifact,) = [each for each in artifacts if each["type"] == "model"]
    assert json.loads(artifact["metadata"]) == {"images_seen": 64}
    handed = {item["path"]: Path(item["local_path"]) for item in artifact["manifest"]["contents"]}
    kept = {file.name: file for file in newest(run).iterdir()}
    assert handed.keys() == kept.keys()
    for name, file in kept.items():
        assert file.read_bytes() == handed[name].read_bytes()


def test_which_words_a_variable_gives_way_to(monkeypatch):
    for mode, meant in [("dryrun", "offline"), ("run", "online"), ("shared", "shared")]:
        monkeypatch.setenv("WANDB_MODE", mode)
        monkeypatch.setenv("WANDB_TAGS", "a, b")
        node = {"mode": "auto", "tags": []}
        assert with_variables(node, {"logger"}) == {"mode": meant, "tags": ["a", "b"]}
        assert with_variables(node, {"logger.mode", "logger.tags"}) == node
    monkeypatch.setenv("WANDB_MODE", "dry")
    with pytest.raises(UserError) as caught:
        check_logger({"_target_": "sdtrain.training.loggers.wandb.wandb"}, ())
    assert caught.value.key == "logger.mode" and caught.value.exit_code == 2


def test_wandb_counts_in_images_seen(wandb_run):
    _, _, _, items, records = wandb_run
    metrics = [record["metric"] for record in records if "metric" in record]
    assert "images_seen" in [metric.get("step_metric") for metric in metrics]
    assert all("images_seen" in item for item in items)


def pixels(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


def test_wandb_holds_the_grids(wandb_run):
    run, _, folder, items, _ = wandb_run
    grids = [item["images_seen"] for item in items if "samples/grid.path" in item]
    assert grids == [32, 64]
    for key, seen, file in [
        ("grid", 64, "grid-000000064"),
        ("grid", 32, "grid-000000032"),
        ("strip", 64, "strip-000000064"),
        ("forward", 0, "forward"),
    ]:
        of_key = [item for item in items if f"samples/{key}.path" in item]
        (item,) = [item for item in of_key if item["images_seen"] == seen]
        assert item[f"samples/{key}._type"] == "image-file"
        kept = pixels(run / "samples" / f"{file}.png")
        logged = pixels(folder / "files" / item[f"samples/{key}.path"])
        assert np.array_equal(kept, logged) and kept.std() > 10


def test_wandb_holds_the_table(wandb_run):
    _, _, folder, items, _ = wandb_run
    tables = [item for item in items if item.get("samples/table._type") == "table-file"]
    assert [item["images_seen"] for item in tables] == [32, 64]
    last = tables[-1]
    table = json.loads((folder / "files" / last["samples/table.path"]).read_text())
    assert table["columns"] == ["images_seen", "prompt", "seed", "guidance_scale", "image"]
    assert [row[:4] for row in table["data"]] == [
        [64, PROMPTS[0], 0, 2.5],
        [64, PROMPTS[1], 1, 2.5],
    ]
    files = [folder / "files" / name for name in last["samples/table_pictures.filenames"]]
    first, second = (pixels(file) for file in files)
    assert first.shape == second.shape == (32, 32, 3) and not np.array_equal(first, second)
    for prompt, caption in zip(PROMPTS, last["samples/table_pictures.captions"], strict=True):
        assert prompt in caption


def test_a_run_that_starts_anew_is_another_to_wandb(tmp_path):
    first = wandb_run_id(tmp_path, resumed=0)
    assert wandb_run_id(tmp_path, resumed=64) == first
    second = wandb_run_id(tmp_path, resumed=0)
    assert second != first
    assert wandb_run_id(tmp_path, resumed=64) == second


@pytest.mark.slow
def test_wandb_disabled(command, tiny, tmp_path):
    words = tiny("logger=wandb", "trainer.max_images=8")
    disabled = {"WANDB_MODE": "disabled"}
    result = command("sdtrain", *words, f"hydra.run.dir={tmp_path}/run", env=disabled)
    assert result.code == 0, result.err
    assert not (tmp_path / "run" / "wandb").exists()
