"""The autoencoder that travels with sdtrain, and what is refused of others."""

import copy
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdtrain.data.shapes import COLOURS, RADII, SHAPES, Shapes, coverage
from sdtrain.errors import UserError
from sdtrain.evaluation.prompt_accuracy import shares_right
from sdtrain.evaluation.verifier import Verifier
from sdtrain.models.autoencoder import WEIGHTS, Autoencoder, Pixels, check_latent_scale
from sdtrain.paths import find_folder
from sdtrain.training.autoencoder_module import psnr

SHIPPED = {"path": "data/shapes_autoencoder", "latent_channels": 4, "downsampling": 4}


@pytest.fixture(scope="module")
def held_out():
    split = Shapes().split("held_out")  # triples that no recipe has seen
    images = torch.stack([split[(place, place)].image for place in range(96)])
    return images, [split.attributes(place) for place in range(96)]


def test_held_out_pictures_come_back(held_out):
    images, attributes = held_out
    autoencoder = Autoencoder(**SHIPPED)
    decoded = autoencoder.decode(autoencoder.encode(images))
    # PSNR by its definition, in float64, beside our function.
    error = (decoded.double() - images.double()).square().mean((1, 2, 3))
    assert (20 * torch.log10(2 / error.sqrt())).mean() >= 38
    torch.testing.assert_close(
        psnr(decoded, images).double(), 20 * torch.log10(2 / error.sqrt()), atol=1e-3, rtol=0
    )
    verifier = Verifier(shapes=SHAPES, palette=COLOURS, radii=RADII, coverage=coverage)
    assert shares_right(verifier, decoded, attributes)["all_four"] >= 0.95
    assert find_folder(SHIPPED["path"], "").joinpath(WEIGHTS).stat().st_size < 2e6


def test_latents_have_unit_variance_and_a_wrong_scale_is_refused_with_the_right_one(held_out):
    images, _ = held_out
    few = images[:16]
    right = Autoencoder(**SHIPPED)
    assert check_latent_scale(right, right.encode(images)) == pytest.approx(1, abs=0.1)
    wrong = Autoencoder(**SHIPPED, latent_scale=2.0)
    with pytest.raises(UserError) as refused:
        check_latent_scale(wrong, wrong.encode(few))
    assert refused.value.key == "model.autoencoder.latent_scale"
    assert re.search(r"model\.autoencoder\.latent_scale=0\.[89]\d*", refused.value.remedy)
    # Scaling is undone by the decoder.
    torch.testing.assert_close(
        wrong.decode(wrong.encode(few[:4])),
        right.decode(right.encode(few[:4])),
        atol=1e-5,
        rtol=0,
    )


def with_config(tmp_path, **changes) -> Path:
    """A copy of the shipped autoencoder whose config.json has these values."""
    folder = tmp_path / "copy"
    shutil.copytree(find_folder(SHIPPED["path"], ""), folder, dirs_exist_ok=True)
    shutil.copyfile(find_folder(SHIPPED["path"], "") / "config.json", folder / "config.json")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


MEAN = [0.5, -0.25, 0.0, 1.0]
STD = [0.5, 2.0, 1.0, 4.0]


@pytest.mark.parametrize(
    ("said", "mean", "std"),
    [
        ({"shift_factor": 0.5}, [0.5] * 4, [1.0] * 4),  # SD3's and FLUX's
        ({"latents_mean": MEAN, "latents_std": STD}, MEAN, STD),
        ({"shift_factor": None, "latents_mean": None, "latents_std": None}, [0.0] * 4, [1.0] * 4),
        ({"shift_factor": 0.0, "scaling_factor": 0.25}, [0.0] * 4, [1.0] * 4),
    ],
)
def test_shift_mean_and_deviation_of_the_config_are_applied(held_out, tmp_path, said, mean, std):
    """As diffusers' pipelines do: (z - mean) scaling_factor / std, and back."""
    images = held_out[0][:4]
    plain = Autoencoder(path=SHIPPED["path"])
    z = plain.encode(images) / plain.latent_scale
    folder = with_config(tmp_path, **said)
    other = Autoencoder(path=str(folder))
    scale = said.get("scaling_factor", plain.latent_scale)
    far = (z - torch.tensor(mean).view(1, -1, 1, 1)) * scale
    torch.testing.assert_close(other.encode(images), far / torch.tensor(std).view(1, -1, 1, 1))
    torch.testing.assert_close(
        other.decode(other.encode(images)), plain.decode(plain.encode(images)), atol=1e-5, rtol=0
    )
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    moved = (other.encode(images, noise) - other.encode(images)) * torch.tensor(std).view(
        1, -1, 1, 1
    )
    torch.testing.assert_close(moved / scale, other.moments(images)[:, 1] * noise)
    unshifted = Autoencoder(path=str(folder), latent_shift=False)
    torch.testing.assert_close(unshifted.encode(images), z * scale)


@pytest.mark.parametrize(
    "said",
    [
        {"latents_mean": MEAN},
        {"latents_mean": 0.5, "latents_std": 1.0},
        {"latents_mean": MEAN, "latents_std": ["1", "1", "1", "1"]},
        {"shift_factor": [0.1, 0.2, 0.3, 0.4]},
        {"shift_factor": math.nan},
        {"scaling_factor": "x"},
        {"latent_channels": "4"},
        {"block_out_channels": []},
        {"latents_mean": MEAN[:3], "latents_std": STD[:3]},
        {"latents_mean": MEAN, "latents_std": [1.0, 1.0, 0.0, 1.0]},
    ],
)
def test_half_a_statistic_is_refused(tmp_path, said):
    with pytest.raises(UserError) as refused:
        Autoencoder(path=str(with_config(tmp_path, **said)))
    assert refused.value.key == "model.autoencoder.path"


def test_posterior_draws_have_the_posteriors_spread(held_out):
    images = held_out[0][:16]
    autoencoder = Autoencoder(**SHIPPED)
    noise = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    moved = autoencoder.encode(images, noise) - autoencoder.encode(images)
    std = autoencoder.net.encode(images).latent_dist.std * autoencoder.latent_scale
    torch.testing.assert_close(moved, std * noise, atol=1e-5, rtol=0)
    assert std.mean() > 0


def test_what_does_not_fit_is_refused(tmp_path):
    folder = shutil.copytree(find_folder(SHIPPED["path"], ""), tmp_path / "other")
    with pytest.raises(UserError) as refused:
        Autoencoder(path=str(folder), latent_channels=8, downsampling=4)
    assert refused.value.key == "model.autoencoder.latent_channels"
    assert refused.value.value == 8 and "latent_channels=4" in str(refused.value)
    with pytest.raises(UserError, match="other weights .* than the run was trained with"):
        Autoencoder(**SHIPPED, sha256="0" * 64)
    with pytest.raises(UserError, match=r"data\.image_size=30 must be a multiple of 4"):
        Autoencoder(**SHIPPED).latent_shape(30)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"model\.autoencoder\.path=.* holds no autoencoder"):
        Autoencoder(path=str(folder), latent_channels=4, downsampling=4)
    with pytest.raises(UserError) as refused:
        Autoencoder(path="nowhere", latent_channels=4, downsampling=4)
    assert (refused.value.key, refused.value.value) == ("model.autoencoder.path", "nowhere")


def layouts(tmp_path) -> dict[str, Path]:
    """Folders with the shipped weights, as diffusers and its pipelines lay them out."""
    net = Autoencoder(path=SHIPPED["path"]).net
    folders = {"whole": tmp_path / "whole", "parts": tmp_path / "parts"}
    net.save_pretrained(folders["whole"])
    net.save_pretrained(folders["parts"], max_shard_size="1MB")
    assert len(list(folders["parts"].glob("*.safetensors"))) > 1
    half = copy.deepcopy(net).half()
    for name, options in (("fp16", {}), ("fp16 parts", {"max_shard_size": "500KB"})):
        folders[name] = tmp_path / name
        half.save_pretrained(folders[name], variant="fp16", **options)
    pipeline = tmp_path / "pipeline"
    shutil.copytree(folders["fp16"], pipeline / "vae")
    (pipeline / "model_index.json").write_text("{}")
    return folders | {"pipeline": pipeline}


def test_every_layout_of_diffusers_is_read(held_out, tmp_path):
    images = held_out[0][:4]
    plain = Autoencoder(path=SHIPPED["path"])  # its weights are in half precision
    folders = layouts(tmp_path)
    for name, folder in folders.items():
        found = Autoencoder(path=str(folder))
        assert (found.latent_channels, found.downsampling) == (4, 4), name
        assert next(found.parameters()).dtype == torch.float32
        torch.testing.assert_close(found.encode(images), plain.encode(images))
        assert all(path.is_file() for path in found.files)
        Autoencoder(path=str(folder), sha256=found.sha256)
    # Any part that is exchanged is noticed, and one that is missing is none of the folder.
    parts = sorted(folders["parts"].glob("*.safetensors"))
    digest = Autoencoder(path=str(folders["parts"])).sha256
    weights = load_file(parts[-1])
    save_file({key: value + 1 for key, value in weights.items()}, parts[-1], {"format": "pt"})
    with pytest.raises(UserError, match="other weights"):
        Autoencoder(path=str(folders["parts"]), sha256=digest)
    parts[0].unlink()
    with pytest.raises(UserError, match=WEIGHTS):
        Autoencoder(path=str(folders["parts"]))


def test_weights_that_are_not_those_of_the_config_are_refused(tmp_path):
    folder = with_config(tmp_path)
    weights = load_file(folder / WEIGHTS)
    weights.pop("quant_conv.weight")
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(UserError, match="quant_conv"):
        Autoencoder(path=str(folder))
    for said in ({"_class_name": "AutoencoderTiny"}, {"block_out_channels": [16, 32]}):
        with pytest.raises(UserError) as refused:
            Autoencoder(path=str(with_config(tmp_path, **said)))
        assert refused.value.key == "model.autoencoder.path", said
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError):
        Autoencoder(path=str(folder))


def test_the_sizes_of_a_run_are_its_autoencoders(composed, tmp_path):
    """Of its folder, or of the first stage that trains it; what the user typed stays."""
    folder = with_config(tmp_path, latent_channels=16, block_out_channels=[8, 8, 8, 8])
    words = [f"model.autoencoder.path={folder}"]
    model = composed(*words)["model"]
    found = [model["autoencoder"][name] for name in ("latent_channels", "downsampling")]
    assert found == [16, 8] and model["unet"]["latent_channels"] == 16
    typed = composed(*words, "model.autoencoder.latent_channels=3")["model"]
    assert typed["unet"]["latent_channels"] == 3 and typed["autoencoder"]["downsampling"] == 8
    stage = composed("experiment=emoji_autoencoder")["model"]
    model = composed("experiment=emoji")["model"]
    assert model["unet"]["latent_channels"] == stage["latent_channels"]
    assert model["autoencoder"]["downsampling"] == 2 ** (len(stage["block_channels"]) - 1)


def test_the_stored_figures_are_those_of_the_weights():
    folder = find_folder(SHIPPED["path"], "")
    measured = json.loads((folder / "measured.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    assert config["scaling_factor"] == measured["latent_scale"] and measured["psnr"] >= 30


def test_pixel_space_changes_nothing(held_out):
    images, _ = held_out
    pixels = Pixels()
    assert torch.equal(pixels.decode(pixels.encode(images)), images) and pixels.latent_shape(
        32
    ) == (3, 32, 32)
