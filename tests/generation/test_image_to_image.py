"""Image-to-image and inpainting: both ends of strength, what a mask keeps, and bad pictures."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline
from PIL import Image
from untrained import SIZE, drawing, make

from sdtrain.diffusion import Objective
from sdtrain.diffusion.prediction import Flow
from sdtrain.diffusion.times import Uniform
from sdtrain.diffusion.weighting.simple import Simple
from sdtrain.errors import UserError
from sdtrain.generation.drawing import Request, StartPicture
from sdtrain.generation.generate import generate
from sdtrain.generation.image_to_image import latent_mask, remaining_times
from sdtrain.generation.start_pictures import read_start_pictures
from sdtrain.samplers.ddim import ddim
from sdtrain.samplers.ddpm import ddpm
from sdtrain.samplers.dpmpp_2m import dpmpp_2m
from sdtrain.samplers.dpmpp_2m_sde import dpmpp_2m_sde
from sdtrain.samplers.euler import euler
from sdtrain.samplers.heun import heun
from sdtrain.samplers.unipc import unipc
from sdtrain.schedules.flow import flow

SAMPLERS = [ddim, partial(ddim, eta=0.5), ddpm, dpmpp_2m, dpmpp_2m_sde, euler, heun, unipc]
LEFT = torch.zeros(1, SIZE, SIZE, dtype=torch.bool)
LEFT[..., : SIZE // 2] = True


@pytest.fixture(scope="module")
def model():
    return make("text")


@pytest.fixture(scope="module")
def picture():
    generator = torch.Generator().manual_seed(7)
    return torch.rand(3, SIZE, SIZE, generator=generator) * 1.6 - 0.8


def asked(picture, mask=None):
    start = None if picture is None else StartPicture(Path("a.png"), (SIZE, SIZE), picture, mask)
    return [Request(seed, prompt="red circle", start=start) for seed in (0, 1)]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_both_ends_of_strength(model, picture, sampler):
    """In pixel space the reconstruction is the picture itself."""
    how = drawing(sampler)
    from_noise = generate(model, asked(None), how, SIZE)
    assert torch.equal(
        generate(model, asked(picture), replace(how, strength=1.0), SIZE), from_noise
    )
    kept = generate(model, asked(picture), replace(how, strength=0.0), SIZE)
    assert torch.equal(kept, picture.expand_as(kept))
    between = generate(model, asked(picture), replace(how, strength=0.5), SIZE)
    distance = (between - picture).abs().mean()
    assert 0.01 < distance < (from_noise - picture).abs().mean()
    assert not torch.equal(between[0], between[1])


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_outside_the_mask_the_latents_are_the_picture(model, picture, sampler, strength):
    how = replace(drawing(sampler), strength=strength)
    drawn = generate(model, asked(picture, LEFT), how, SIZE)
    outside = ~LEFT.expand(3, -1, -1)
    for each in drawn:
        assert torch.equal(each[outside], picture[outside])
        assert (each[~outside] - picture[~outside]).abs().mean() > 0.01


def test_what_is_kept_has_the_noise_of_each_level(model, picture):
    """The network sees alpha x0 + sigma eps there, with one eps, under a sampler without noise."""
    how = replace(drawing(ddim), strength=1.0)
    schedule = model.objective.schedule
    grid = how.grid(how.steps, schedule)
    implied = []

    def show(step, x, x0):
        alpha, sigma = schedule.alpha_sigma(grid[step])
        implied.append((x - alpha * picture) / sigma)

    generate(model, asked(picture, LEFT), how, SIZE, show)
    outside = ~LEFT.expand(2, 3, -1, -1)
    assert len(implied) == how.steps
    for eps in implied[1:]:
        torch.testing.assert_close(eps[outside], implied[0][outside], rtol=0, atol=1e-3)
    assert 0.7 < implied[0][outside].std() < 1.3


@pytest.mark.parametrize("steps", [1, 7, 10, 50])
def test_as_many_steps_as_diffusers_takes(steps):
    pipeline = object.__new__(StableDiffusionImg2ImgPipeline)
    pipeline.scheduler = DDIMScheduler()
    pipeline.scheduler.set_timesteps(steps)
    for strength in (0.0, 0.29, 0.3, 0.6, 0.8, 0.99, 1.0):
        theirs = StableDiffusionImg2ImgPipeline.get_timesteps(pipeline, steps, strength, "cpu")[1]
        grid = torch.linspace(1, 0, steps, dtype=torch.float64)
        ours = remaining_times(grid, strength)
        assert len(ours) == theirs, strength
        assert torch.equal(ours, grid[steps - theirs :])


def test_a_latent_that_covers_a_masked_pixel_is_drawn():
    mask = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    mask[..., 7, 8] = True
    found = latent_mask(mask, (2, 2))
    assert found.tolist() == [[[[False, True], [False, False]]]]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    for name, colour in (("b.png", "red"), ("a.png", "blue")):
        Image.new("RGB", (20, 12), colour).save(tmp_path / "pictures" / name)
    half = Image.new("L", (20, 12), 0)
    half.paste(255, (10, 0, 20, 12))
    half.save(tmp_path / "mask.png")
    Image.new("L", (12, 20), 255).save(tmp_path / "turned.png")
    Image.new("L", (20, 12), 0).save(tmp_path / "black.png")
    Image.new("L", (20, 12), 255).save(tmp_path / "white.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "empty").mkdir()
    return tmp_path


def test_pictures_and_masks_are_cropped_alike(folder, model):
    """The middle 8 x 8 of 13 x 8, of which the right half is masked; and a thin line, which scaling
    down would thin out.
    """
    read = read_start_pictures(f"{folder}/pictures", f"{folder}/mask.png", 8, model)
    assert [each.file.name for each in read] == ["a.png", "b.png"]
    assert read[0].image[:, 0, 0].tolist() == [-1, -1, 1]
    assert read[0].mask.shape == (1, 8, 8)
    shares = read[0].mask.float().mean((0, 1)).tolist()
    assert shares[:3] == [0, 0, 0] and shares[5:] == [1, 1, 1]
    line = Image.new("RGBA", (400, 240), (0, 0, 0, 0))
    line.paste((255, 255, 255, 255), (200, 0, 201, 240))
    line.save(folder / "line.png")
    Image.new("RGB", (400, 240), "red").save(folder / "large.png")
    (large,) = read_start_pictures(f"{folder}/large.png", f"{folder}/line.png", 8, model)
    assert large.mask.any(dim=1).sum() == 1
    (wide,) = read_start_pictures(f"{folder}/pictures/a.png", None, (4, 8), model)
    assert wide.image.shape == (3, 4, 8) and wide.mask is None


@pytest.mark.parametrize(
    ("picture", "mask", "key"),
    [
        ("empty", None, "init_image"),
        ("broken.png", None, "init_image"),
        ("pictures/a.png", "broken.png", "mask"),
        ("pictures/a.png", "turned.png", "mask"),
        ("pictures/a.png", "black.png", "mask"),
        ("pictures/a.png", "white.png", "mask"),
    ],
)
def test_what_does_not_fit_is_refused(folder, model, picture, mask, key):
    mask = None if mask is None else f"{folder}/{mask}"
    with pytest.raises(UserError) as refused:
        read_start_pictures(f"{folder}/{picture}", mask, 8, model)
    assert refused.value.key == key and refused.value.exit_code == 3


def test_an_autoencoder_that_only_decodes_is_refused(folder, model):
    class Decoder(torch.nn.Module):
        pass

    one_way = make("text")
    one_way.autoencoder = Decoder()
    with pytest.raises(UserError) as refused:
        read_start_pictures(f"{folder}/pictures", None, 8, one_way)
    assert refused.value.key == "init_image" and refused.value.exit_code == 2


def test_a_path_that_is_no_variance_preserving_one(picture):
    """On the straight path, noise of level t is sigma = t; and a rectangle, drawn one by one."""
    model = make("none")
    model.objective = Objective(
        schedule=flow(), prediction=Flow(), weighting=Simple(), times=Uniform()
    )
    wide = torch.cat([picture, -picture], dim=2)
    mask = torch.cat([LEFT, LEFT], dim=2)
    how = replace(drawing(ddim), strength=0.5)
    seen = []

    def show(step, x, x0):
        seen.append(x)

    drawn = generate(model, asked(wide, mask), how, (SIZE, 2 * SIZE), show)
    alpha, sigma = flow().alpha_sigma(how.grid(how.steps, flow())[2])
    eps = (seen[0] - alpha * wide) / sigma
    assert alpha + sigma == pytest.approx(1)
    assert abs(eps.std() - 1) < 0.15 and abs(eps.mean()) < 0.15
    one_by_one = generate(model, asked(wide, mask), replace(how, batch_size=1), (SIZE, 2 * SIZE))
    torch.testing.assert_close(one_by_one, drawn, rtol=0, atol=1e-5)
