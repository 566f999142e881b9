"""Runs of adapters, and of a subject with its prior: resumed, on two ranks, cached, exported."""

import shutil

import numpy as np
import pytest
import stored_pictures
import torch
from PIL import Image
from reading import BARE, checkpoints, flattened, lines, same, tensors
from safetensors.torch import load_file
from stable_diffusion import save_pipeline

from sdtrain.adapters.embedding_file import EMBEDDING
from sdtrain.adapters.lora_file import FILE

INVERSION = ["adapter=textual_inversion", "adapter.word=<gem>", "adapter.initial=red"]
LORA = ["adapter=lora", "adapter.rank=2", "optimizer.lr=0.01"]
RUNS = {
    "textual_inversion": [*INVERSION, "adapter.vectors=2"],
    "lora": [*LORA, "adapter.text_encoder=true"],
    "lora of the unet": LORA,
    "dora in bf16": [*LORA, "adapter.dora=true", "model.frozen_dtype=bf16"],
    "dreambooth": ["data.prior=PRIOR", "data.prior_prompt=a star", "data.prior_weight=0.5"],
    "dreambooth with lora": [*LORA, "data.prior=PRIOR", "data.prior_prompt=a star"],
}
QUICK = ("textual_inversion", "lora")
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
CACHED = ["textual_inversion", "lora of the unet", "dreambooth", "dreambooth with lora"]
"""With a word that is learned only latents are cached, with the others contexts too."""


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """words(NAME) -> the command line of that run, without its folder."""
    folder = tmp_path_factory.mktemp("given")
    pipeline = save_pipeline(folder / "pipeline")
    pictures = stored_pictures.write_folder(folder / "pictures", stored_pictures.rows(16))
    prior = stored_pictures.write_folder(folder / "prior", stored_pictures.rows(12))

    def of(name):
        return [
            "model=stable_diffusion",
            f"model.pretrained={pipeline}",
            "model.autoencoder.latent_scale=0.9",
            "data=images",
            f"data.path={pictures}",
            "data.caption_template=a <gem>",
            "data.image_size=32",
            "data.upscale=true",
            "data.num_workers=0",
            *(word.replace("PRIOR", str(prior)) for word in RUNS[name]),
        ]

    return of


@pytest.fixture(scope="module")
def straight(train_tiny, words, tmp_path_factory):
    """straight(NAME) -> a run of that name, to its end, with samples and validation."""
    folder = tmp_path_factory.mktemp("straight")

    def run_of(name):
        run = folder / name
        if not run.exists():
            result = train_tiny(run, *words(name), "checkpoint.keep=9")
            assert result.code == 0, result.err
        return run

    return run_of


def weights(run):
    return tensors(checkpoints(run)[-1])


@pytest.mark.parametrize("name", NAMES)
def test_resumed_in_the_middle_it_ends_in_the_same_weights(
    train_tiny, words, straight, name, tmp_path
):
    run = straight(name)
    middle = checkpoints(run)[1]
    shutil.copytree(middle, tmp_path / "run/checkpoints" / middle.name)
    result = train_tiny(tmp_path / "run", *words(name), "checkpoint.keep=9", "resume=must")
    assert result.code == 0, result.err
    assert same(weights(tmp_path / "run"), weights(run))
    assert not same(weights(run), tensors(checkpoints(run)[0]))
    last = checkpoints(run)[-1]
    trained = load_file(last / "model.safetensors")
    assert load_file(last / "ema.safetensors").keys() == trained.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_samples_and_validation_change_no_weight(train_tiny, words, straight, name, tmp_path):
    never = ["callbacks.samples.every=0", "validation.every=0"]
    result = train_tiny(tmp_path / "run", *words(name), *never)
    assert result.code == 0, result.err
    assert same(weights(tmp_path / "run"), weights(straight(name)))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*QUICK, "dreambooth with lora"])
def test_two_ranks_train_like_one(command, tiny, words, straight, name, tmp_path):
    ranks = ["strategy=ddp", "trainer.devices=2", f"hydra.run.dir={tmp_path}/run"]
    result = command("sdtrain", *tiny(*words(name)), *ranks)
    assert result.code == 0, result.err
    difference = flattened(weights(tmp_path / "run")) - flattened(weights(straight(name)))
    assert 0 < difference.norm() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", CACHED)
def test_a_cache_gives_the_losses_of_a_run_without(train_tiny, words, name, tmp_path):
    def losses(run, *more):
        usual = [*BARE, "trainer.max_images=24", "trainer.log_every=8"]
        result = train_tiny(run, *words(name), *usual, *more)
        assert result.code == 0, result.err
        return torch.tensor([line["train/loss"] for line in lines(run) if "train/loss" in line])

    cached = losses(tmp_path / "cached", f"data.cache={tmp_path}/cache")
    torch.testing.assert_close(cached, losses(tmp_path / "off"), rtol=1e-5, atol=0)
    assert len(cached) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_what_is_exported_draws_what_the_run_draws(here, words, straight, name, tmp_path):
    """As a whole pipeline, and as a file beside the one that it was trained in."""
    run = straight(name)
    formats = {"textual_inversion": ["embedding"], "lora": ["diffusers", "kohya"]}[name]
    pipeline = words(name)[1].partition("=")[2]
    sources = {"run": [f"checkpoint={run}"]}
    for layout in ("folder", *formats):
        output = tmp_path / layout
        result = here("sdtrain-export", f"checkpoint={run}", f"output={output}", f"format={layout}")
        assert result.code == 0, result.err
        key = "embedding" if layout == "embedding" else "lora"
        sources[layout] = [f"checkpoint={pipeline}", f"{key}={output}"]
        halved = [f"output={output}-fp16", f"format={layout}", "dtype=fp16", f"checkpoint={run}"]
        if layout != "folder":
            assert here("sdtrain-export", *halved).code == 0
            (file,) = (tmp_path / f"{layout}-fp16").iterdir()
            kept = [value for key, value in load_file(file).items() if not key.endswith(".alpha")]
            assert {value.dtype for value in kept} == {torch.float16}
    sources["folder"] = [f"checkpoint={tmp_path}/folder"]
    sources["base"] = [f"checkpoint={pipeline}"]
    drawn = {}
    for source, given in sources.items():
        output = tmp_path / "drawn" / source
        usual = ["prompt=a <gem>", "steps=2", "num_images=2", f"output={output}"]
        result = here("sdtrain-sample", *given, *usual, "guidance.max_std=null")
        assert result.code == 0, result.err
        drawn[source] = np.array(Image.open(output / "00000-seed0.png"), dtype=int)
    for source, picture in drawn.items():
        difference = abs(picture - drawn["run"]).max()
        assert (difference > 1) == (source == "base"), (source, difference)
    single = [f"checkpoint={run}", f"output={tmp_path}/single", "format=single_file"]
    result = here("sdtrain-export", *single)
    assert (result.code == 0) == (name != "textual_inversion"), result.err
    file = EMBEDDING if name == "textual_inversion" else FILE
    assert {path.name for path in (tmp_path / formats[0]).iterdir()} == {file}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["textual_inversion", "lora of the unet"])
def test_contexts_are_precomputed_only_if_the_text_encoder_is_frozen(
    here, tiny, words, name, tmp_path
):
    cache = tmp_path / "cache"
    given = [*tiny(*words(name)), f"data.cache={cache}", f"hydra.run.dir={tmp_path}/run"]
    result = here("sdtrain-precompute", *given, cwd=tmp_path)
    assert result.code == 0, result.err
    assert (cache / "latents").is_dir()
    assert (cache / "texts").is_dir() == (name != "textual_inversion")


def test_a_prior_is_drawn_first_and_once(train_tiny, words, tmp_path):
    """By the model before training; and pictures of another prompt are not taken for them."""
    prior = tmp_path / "prior"
    given = [word for word in words("dreambooth") if not word.startswith("data.prior=")]
    given += [
        f"data.prior={prior}",
        "data.prior_images=3",
        *BARE,
        "trainer.max_images=8",
        "steps=2",
    ]
    assert train_tiny(tmp_path / "run", *given).code == 0
    names = [f"{number:06}.png" for number in range(3)]
    assert sorted(path.name for path in prior.glob("*.png")) == names
    times = [(prior / name).stat().st_mtime_ns for name in names]
    (prior / names[1]).unlink()
    assert train_tiny(tmp_path / "again", *given).code == 0
    assert same(weights(tmp_path / "again"), weights(tmp_path / "run"))
    kept = [(prior / name).stat().st_mtime_ns for name in names]
    assert (kept[0], kept[2]) == (times[0], times[2])
    assert train_tiny(tmp_path / "heavy", *given, "data.prior_weight=2").code == 0
    assert not same(weights(tmp_path / "heavy"), weights(tmp_path / "run"))
    result = train_tiny(tmp_path / "other", *given, "data.prior_prompt=a ring")
    assert (result.code, "data.prior" in result.paragraph) == (2, True)


@pytest.mark.slow
def test_what_does_not_fit_is_named(here, tiny, words, tmp_path):
    """With the key to change, and no folder left."""
    empty = tmp_path / "empty"
    empty.mkdir()
    file = tmp_path / "file"
    file.touch()
    to_draw = [f"data.prior={tmp_path}/missing", "data.prior_prompt=a"]
    lora = words("lora")
    dreambooth = [word for word in words("dreambooth") if not word.startswith("data.prior_")]
    cases = (
        ("adapter.word", [*words("textual_inversion"), "adapter.word=red"]),
        ("adapter.initial", [*words("textual_inversion"), "adapter.initial=xylophone"]),
        ("adapter.vectors", [*words("textual_inversion"), "adapter.vectors=0"]),
        ("adapter.word", [*words("textual_inversion"), "adapter.word=<other>"]),
        ("adapter.targets", [*lora, "adapter.targets=[nowhere]"]),
        ("adapter.rank", [*lora, "adapter.rank=0"]),
        ("model.train", [*lora, "model.train=[unet]"]),
        ("model/channels", [*lora, "model/channels=[depth]"]),
        ("adapter", ["adapter=lora"]),
        ("data.prior", [*dreambooth, f"data.prior={empty}"]),
        ("data.prior", [*dreambooth, f"data.prior={tmp_path}/missing"]),
        ("data.prior", [*dreambooth, "data.buckets=true"]),
        ("data.prior_weight", [*dreambooth, "data.prior_weight=0"]),
        ("data.prior_weight", [*dreambooth, "data.prior_weight=abc"]),
        ("data.prior_images", [*dreambooth, "data.prior_prompt=a", "data.prior_images=1"]),
        ("data.prior", [*dreambooth, "data.prior_prompt=a", f"data.prior={file}"]),
        ("data.prior", [*dreambooth, f"data.prior={words('lora')[4].partition('=')[2]}"]),
        ("data.batch_size", [*dreambooth, *to_draw, "data.batch_size=100"]),
        ("adapter.word", [*words("textual_inversion"), "adapter.word=red", *to_draw]),
        ("data.prior_prompt", [*dreambooth, "data.prior=null", "data.prior_prompt=a"]),
    )
    for key, given in cases:
        folder = f"hydra.run.dir={tmp_path}/run"
        result = here("sdtrain", *tiny(*given, *BARE), folder, cwd=tmp_path)
        assert result.code in (2, 3), (key, result.out, result.err)
        assert key in result.paragraph, (key, result.err)
        assert not (tmp_path / "run").exists(), key
        assert not (tmp_path / "missing").exists(), key
    assert not any(empty.iterdir())
