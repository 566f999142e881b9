"""sdtrain-evaluate measures a pipeline of diffusers on the data that the command names."""

import json

import pytest
from stable_diffusion import save_pipeline


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("pretrained") / "pipeline")


SMALL = ["num_images=4", "steps=2"]


def test_its_numbers_are_written_to_output(pipeline, here, tmp_path):
    output = tmp_path / "measured"
    words = [f"checkpoint={pipeline}", "data=shapes", *SMALL, f"output={output}"]
    result = here("sdtrain-evaluate", *words)
    assert result.code == 0, result.err
    found = json.loads((output / "evaluation.json").read_text())
    assert found["checkpoint"] == str(pipeline)
    assert 0 <= found["prompt_accuracy"]["held_out"]["colour"] <= 1
    assert found["settings"]["prompt_accuracy"]["guidance_scale"] == 3
    assert sorted(path.name for path in pipeline.iterdir()) == [
        "model_index.json",
        "scheduler",
        "text_encoder",
        "tokenizer",
        "unet",
        "vae",
    ]


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["data=shapes"], "output"),
        (["output=OUT"], "data"),
        (["output=OUT", "data=shape"], "data=shape"),
        (["output=OUT", "data=shapes", "data.siez=3"], "data.siez"),
        (["output=OUT", "data=images", "metrics=retrieval"], "data.path"),
    ],
)
def test_what_a_pipeline_needs_is_named(pipeline, here, tmp_path, words, key):
    typed = [word.replace("OUT", f"{tmp_path}/out") for word in words]
    result = here("sdtrain-evaluate", f"checkpoint={pipeline}", *SMALL, *typed)
    assert result.code == 2
    assert key in result.paragraph
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_a_run_names_its_own_data(tiny_run, here):
    words = ["data=images", "metrics=prompt_accuracy", "num_images=4"]
    result = here("sdtrain-evaluate", f"checkpoint={tiny_run}", *words)
    assert result.code == 2
    assert "data=images" in result.paragraph
