"""Runs whose latents and contexts come from a cache: losses as without one, and all proofs."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from reading import BARE, checkpoints, flattened, lines, same, tensors
from safetensors.torch import load_file
from stable_diffusion import save_pipeline

from sdtrain.conditioning.clip import Clip
from sdtrain.config.cache_keys import check_cache, fill_in_cache
from sdtrain.config.check import Checker
from sdtrain.data.shapes import Shapes
from sdtrain.errors import UserError
from sdtrain.models.autoencoder import Autoencoder
from sdtrain.runs.resume import compare_configs

COUNT = 32
STEPS = [
    *BARE,
    "trainer.max_images=48",
    "trainer.log_every=8",
    "checkpoint.every=16",
    "checkpoint.keep=9",
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    split = Shapes(size=COUNT).split("train")
    for number in range(COUNT):
        row = split[number, number]
        pixels = ((row.image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(row.caption)
    return folder


@pytest.fixture(scope="module")
def words(pictures, tmp_path_factory) -> list[str]:
    """A pipeline that is fine-tuned on the pictures, with a drawn posterior and mirrored twins."""
    pipeline = save_pipeline(tmp_path_factory.mktemp("pretrained") / "pipeline")
    return [
        "model=stable_diffusion",
        f"model.pretrained={pipeline}",
        "model.autoencoder.latent_scale=0.9",
        "data=images",
        f"data.path={pictures}",
        "data.image_size=32",
        "data.flip=true",
        "data.num_workers=0",
        "model.caption_dropout=0.5",
        *STEPS,
    ]


@pytest.fixture(scope="module")
def straight(train_tiny, words, tmp_path_factory):
    """(the run, its cache, what it printed)."""
    folder = tmp_path_factory.mktemp("straight")
    cache = folder / "cache"
    result = train_tiny(folder / "run", *words, f"data.cache={cache}")
    assert result.code == 0, result.err
    return folder / "run", cache, result.out


def losses(run: Path) -> torch.Tensor:
    return torch.tensor([line["train/loss"] for line in lines(run) if "train/loss" in line])


def test_the_losses_are_those_of_a_run_without_a_cache(
    train_tiny, words, straight, tmp_path, monkeypatch
):
    """To rounding; and neither the autoencoder nor the text encoder is run for them."""
    assert train_tiny(tmp_path / "off", *words).code == 0
    assert len(losses(straight[0])) == 6
    torch.testing.assert_close(losses(straight[0]), losses(tmp_path / "off"), rtol=1e-5, atol=0)

    def not_needed(*_):
        raise AssertionError("is not needed")

    monkeypatch.setattr(Autoencoder, "moments", not_needed)
    monkeypatch.setattr(Clip, "_context", not_needed)
    monkeypatch.setattr("sdtrain.training.parts.check_fit", lambda model, data: None)
    run = tmp_path / "again"
    result = train_tiny(run, *words, f"data.cache={straight[1]}")
    assert result.code == 0, result.err
    assert same(tensors(checkpoints(run)[-1]), tensors(checkpoints(straight[0])[-1]))


def test_the_command_makes_what_a_run_reads(here, tiny, words, straight, tmp_path):
    """The same bits; with its own defaults of data.cache, and no folder of a run."""
    folder = tmp_path / "cache"
    given = [*tiny(*words), f"hydra.run.dir={tmp_path}/run"]
    result = here("sdtrain-precompute", *given, f"data.cache={folder}", cwd=tmp_path)
    assert result.code == 0, result.err
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    for path in sorted(straight[1].rglob("*.safetensors")):
        made = load_file(folder / path.relative_to(straight[1]))
        assert same(made, load_file(path))
    result = here("sdtrain-precompute", *given, "data.cache=off", cwd=tmp_path)
    assert (result.code, "data.cache" in result.paragraph) == (2, True)
    result = here("sdtrain-precompute", "-m", *tiny(*words), "seed=1,2", cwd=tmp_path)
    assert (result.code, "-m" in result.paragraph) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


@pytest.mark.slow
def test_auto_is_below_the_users_cache(train_tiny, words, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    result = train_tiny(tmp_path / "run", *words, "data.cache=auto", "trainer.max_images=8")
    assert result.code == 0, result.err
    (latents,) = (tmp_path / "xdg" / "sdtrain" / "latents").iterdir()
    assert str(latents) in result.out
    identity = json.loads((latents / "identity.json").read_text())
    assert identity["dtype"] == "fp32"


@pytest.mark.slow
def test_a_resumed_run_has_the_bits_of_a_straight_one(train_tiny, words, straight, tmp_path):
    """From each checkpoint, with other workers, and from a copy of the cache elsewhere."""
    run, cache, _ = straight
    shutil.copytree(cache, tmp_path / "moved")
    for number, checkpoint in enumerate(checkpoints(run)[:-1]):
        again = tmp_path / f"from{number}"
        shutil.copytree(run, again)
        for later in checkpoints(again):
            if later.name > checkpoint.name:
                shutil.rmtree(later)
        where = cache if number else tmp_path / "moved"
        changed = [f"data.cache={where}", f"data.num_workers={2 * number}", "resume=must"]
        given = [word for word in words if not word.startswith("data.num_workers")]
        result = train_tiny(again, *given, *changed)
        assert result.code == 0, result.err
        assert same(tensors(checkpoints(again)[-1]), tensors(checkpoints(run)[-1]))


@pytest.mark.slow
def test_two_ranks_train_like_one(command, tiny, words, straight, tmp_path):
    run, cache, _ = straight
    other = tmp_path / "two"
    ranks = ["strategy=ddp", "trainer.devices=2", f"data.cache={tmp_path}/cache"]
    result = command("sdtrain", *tiny(*words, *ranks), f"hydra.run.dir={other}")
    assert result.code == 0, result.err
    torch.testing.assert_close(losses(other), losses(run), rtol=1e-5, atol=0)
    difference = flattened(tensors(checkpoints(other)[-1])) - flattened(
        tensors(checkpoints(run)[-1])
    )
    assert difference.norm() < 1e-4
    keys = [load_file(path)["keys"] for path in (tmp_path / "cache").rglob("*.safetensors")]
    assert len(keys) > 1
    assert len(torch.cat(keys).unique(dim=0)) == len(torch.cat(keys))  # each was computed once


def test_a_run_does_not_change_between_pictures_and_cache():
    """Their latents differ by rounding. Where the cache is does not matter."""

    def refused(old, new, allowed=()):
        changes = compare_configs({"data": {"cache": old}}, {"data": {"cache": new}}, allowed)
        return list(changes.refused)

    assert refused("off", "auto") == ["data.cache"]
    assert refused("/a", "off") == ["data.cache"]
    assert refused("off", "auto", ["data.cache"]) == []
    assert refused("/a", "auto") == []
    assert refused(None, "off") == []
    assert refused(None, "auto") == ["data.cache"]
    halved = {"data": {"cache": "auto"}, "cache": {"dtype": "fp16"}}
    none = {"data": {"cache": "off"}, "cache": {"dtype": "fp32"}}
    assert list(compare_configs(halved, none, ["data.cache"]).refused) == []


def test_bad_settings_are_refused(tiny_config, pictures):
    """Before anything is read, with the key to change."""
    usual = [
        "data=images",
        f"data.path={pictures}",
        "model.autoencoder.path=data/shapes_autoencoder",
    ]
    cached = {"data.cache": "auto"}
    config = tiny_config(*usual)
    shapes = tiny_config()
    autoencoder = copy.deepcopy(config)
    autoencoder["model"]["_target_"] = "sdtrain.training.autoencoder_module.AutoencoderModule"
    pixels = copy.deepcopy(config)
    pixels["model"]["autoencoder"]["_target_"] = "sdtrain.models.autoencoder.Pixels"
    for base, values, key in (
        (config, cached | {"data.crop": "random"}, "data.crop"),
        (shapes, cached, "data.cache"),
        (config, {"cache.dtype": "fp16"}, "cache.dtype"),
        (config, cached | {"cache.dtype": "bf16"}, "cache.dtype"),
        (config, {"data.cache": 3}, "data.cache"),
        (config, {"data.cache": str(pictures / "00.png")}, "data.cache"),
        (autoencoder, cached, "data.cache"),
        (pixels, cached, "data.cache"),
    ):
        changed = copy.deepcopy(base)
        for name, value in values.items():
            section, _, argument = name.partition(".")
            changed[section][argument] = value
        with pytest.raises(UserError) as caught:
            fill_in_cache(changed, Checker(values))
            is_autoencoder = base is autoencoder
            check_cache(changed, set(values), trains_autoencoder=is_autoencoder)
        assert caught.value.key == key, values


def test_a_file_named_auto_is_not_the_cache(composed, tmp_path, monkeypatch):
    (tmp_path / "auto").touch()
    monkeypatch.chdir(tmp_path)
    config = composed("data=images", "data.path=.", "data.cache=auto")
    fill_in_cache(config, Checker(set()))
    check_cache(config, {"data.cache"}, trains_autoencoder=False)
    config["data"]["cache"] = str(tmp_path / "auto")
    with pytest.raises(UserError) as refused:
        check_cache(config, {"data.cache"}, trains_autoencoder=False)
    assert refused.value.key == "data.cache"
