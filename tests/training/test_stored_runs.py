"""Runs on stored data sets: like those on a folder, with both stages, and read back by others."""

import json

import pytest
from reading import numbers
from stored_pictures import FORMATS, rows, write_folder, write_parquet

WORDS = [
    "model/autoencoder=pixels",
    "data.image_size=16",
    "data.batch_size=4",
    "data.num_workers=1",
    "trainer.max_images=16",
    "callbacks=none",
]


@pytest.mark.slow
def test_each_format_trains_like_a_folder(train_tiny, tmp_path):
    made = rows()
    folder = write_folder(tmp_path / "folder", made)
    result = train_tiny(tmp_path / "run", "data=images", f"data.path={folder}", *WORDS)
    assert result.code == 0, result.err
    expected = numbers(tmp_path / "run")
    for name, write in FORMATS.items():
        run = tmp_path / f"run_{name}"
        place = write(tmp_path / name, made)
        result = train_tiny(run, "data=dataset", f"data.path={place}", *WORDS)
        assert result.code == 0, result.err
        assert numbers(run) == expected, name


@pytest.mark.slow
def test_both_stages_read_it_and_the_run_is_evaluated_where_it_went(command, here, tiny, tmp_path):
    stored = write_parquet(tmp_path / "stored", rows(32))
    run = tmp_path / "run"
    words = [
        "data=dataset",
        f"data.path={stored}",
        "data.caption_template=a {style} {label}, told",
        "data.image_size=16",
        "data.batch_size=4",
        "first_stage.max_images=16",
        "trainer.max_images=16",
        "callbacks=none",
    ]
    result = command("sdtrain", *tiny(*words), f"hydra.run.dir={run}")
    assert result.code == 0, result.err
    assert (run / "first_stage/autoencoder/config.json").is_file()
    prompts = json.loads((run / "data.json").read_text())["example_prompts"]
    assert set(prompts) <= {
        f"a {a} {b}, told" for a in ("loud", "quiet") for b in ("red", "green", "blue")
    }
    moved = stored.rename(tmp_path / "moved")
    asked = [f"checkpoint={run}", "metrics=retrieval", "num_images=4", "steps=2", "ema=false"]
    gone = here("sdtrain-evaluate", *asked, f"output={tmp_path}/gone")
    assert gone.code == 3
    asked += [f"output={tmp_path}/found", f"data.path={moved}", "data.columns.label=label"]
    found = here("sdtrain-evaluate", *asked)
    assert found.code == 0, found.err
