"""Seed and prompt to picture: a picture is its own request's, whatever it is drawn with."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from untrained import CONDITIONERS, SIZE, drawing, make

from sdtrain.errors import UserError
from sdtrain.generation.drawing import Request
from sdtrain.generation.generate import generate
from sdtrain.generation.steps import compare_steps, draws_noise
from sdtrain.samplers.ddim import ddim
from sdtrain.samplers.ddpm import ddpm
from sdtrain.samplers.dpmpp_2m import dpmpp_2m
from sdtrain.samplers.grids import leading, trailing

WORDS = ["red circle", "blue square", "", "a tree", "green"]


@pytest.fixture(scope="module", params=[name for name in CONDITIONERS if name != "depth"])
def model(request):
    return make(request.param)


@pytest.fixture(scope="module")
def text():
    return make("text")


def requests(count):
    asked = []
    for seed in range(count):
        negative = "blue" if seed == 3 else ""
        word = WORDS[seed % 5]
        asked.append(Request(seed, prompt=word, negative_prompt=negative, label=seed % 5))
    return asked


def assert_same(one, other, atol=1e-5):
    torch.testing.assert_close(
        one, other, rtol=0, atol=atol
    )  # float32 sums go in another order where batches differ in size


def assert_batches_make_no_difference(model, sampler, batch_sizes):
    asked = requests(4)
    together = generate(model, asked, drawing(sampler), SIZE)
    assert together.shape == (4, 3, SIZE, SIZE)
    assert together.device.type == "cpu"
    assert (together.abs() < 1).float().mean() > 0.3  # clamped pixels would agree whatever happened
    for batch_size in batch_sizes:
        apart = generate(model, asked, drawing(sampler, batch_size=batch_size), SIZE)
        assert_same(apart, together)
    order = [3, 0, 2, 1]
    reordered = generate(model, [asked[place] for place in order], drawing(sampler), SIZE)
    assert_same(reordered, together[order])


def test_a_picture_does_not_depend_on_its_batch(model):
    assert_batches_make_no_difference(model, ddpm, [1, 3])


@pytest.mark.parametrize("sampler", [partial(ddim, eta=0.5), ddim], ids=["eta .5", "eta 0"])
def test_a_picture_of_another_sampler_does_not_depend_on_its_batch(text, sampler):
    assert_batches_make_no_difference(text, sampler, [3])


def test_a_picture_depends_on_its_own_seed(model):
    one = generate(model, [Request(seed) for seed in (0, 1, 2)], drawing(), SIZE)
    other = generate(model, [Request(seed) for seed in (0, 2**32 + 1, 2)], drawing(), SIZE)
    assert torch.equal(one[[0, 2]], other[[0, 2]])
    assert (one[1] - other[1]).abs().mean() > 0.05
    assert (one[0] - one[1]).abs().mean() > 0.05


def test_noise_of_the_steps_is_keyed_too(model):
    """What a sampler is handed: for each picture and each step numbers of its own, the same at
    every call and in every company."""
    seen = []

    def sampler(denoise, x, grid, schedule, noise, show=None):
        seen.append([x, noise(1), noise(0), noise(1)])
        return x

    for seeds in ((0, 1, 2), (2,)):
        generate(model, [Request(seed) for seed in seeds], drawing(sampler), SIZE)
    (start, second, first, again), alone = seen
    assert torch.equal(second, again)
    assert all(torch.equal(company[2:], one) for company, one in zip(seen[0], alone, strict=True))
    numbers = torch.stack([start, first, second]).reshape(
        9, 192
    )  # start and two steps of 3 pictures
    assert (numbers.corrcoef() - torch.eye(9)).abs().max() < 4 / 192**0.5


def test_the_condition_is_heard():
    text = make("text")
    label = make("class_label")
    none = make("none")
    pictures = generate(text, [Request(0, prompt=word) for word in WORDS], drawing(), SIZE)
    labelled = generate(label, [Request(0, label=number) for number in range(5)], drawing(), SIZE)
    for several in (pictures, labelled):
        assert len({picture.numpy().tobytes() for picture in several}) == 5
    assert torch.equal(
        *generate(
            none,
            [Request(0, prompt="red", label=1), Request(0, prompt="blue", label=2)],
            drawing(),
            SIZE,
        )
    )


def test_without_negative_prompt_guidance_leads_away_from_the_empty_one(text):
    """At scale 0 the unconditional network draws alone: the same picture as the empty prompt at
    scale 1."""
    unconditional = generate(
        text,
        [Request(3, prompt="red circle"), Request(3, prompt="red circle", negative_prompt="")],
        drawing(scale=0.0),
        SIZE,
    )
    assert_same(unconditional, generate(text, [Request(3), Request(3)], drawing(scale=1.0), SIZE))
    # At any scale: prompt and negative prompt that are alike cancel, and without a prompt nothing
    # is led away from.
    assert_same(
        generate(text, [Request(3)], drawing(scale=5.0), SIZE),
        generate(text, [Request(3)], drawing(scale=1.0), SIZE),
    )


def test_a_negative_prompt_stands_where_the_empty_one_would(text):
    asked = [
        Request(3, prompt="red circle", negative_prompt="a tree"),
        Request(4, prompt="red circle"),
    ]
    assert_same(
        generate(text, asked, drawing(scale=0.0), SIZE),
        generate(text, [Request(3, prompt="a tree"), Request(4)], drawing(scale=1.0), SIZE),
    )
    both = generate(text, asked, drawing(scale=3.0), SIZE)
    without = generate(
        text,
        [Request(3, prompt="red circle"), Request(4, prompt="red circle")],
        drawing(scale=3.0),
        SIZE,
    )
    assert (both[0] - without[0]).abs().max() > 1e-3
    assert_same(both[1], without[1])


def test_a_dropped_label_is_what_guidance_leads_away_from():
    """Of class labels: at scale 0 all labels give one picture, and a negative prompt, which text
    conditioners alone read, changes nothing."""
    model = make("class_label")
    pictures = generate(
        model, [Request(3, label=number) for number in range(5)], drawing(scale=0.0), SIZE
    )
    assert_same(pictures, pictures[:1].expand_as(pictures))
    assert (
        pictures[0] - generate(model, [Request(3, label=0)], drawing(scale=1.0), SIZE)[0]
    ).abs().max() > 1e-3
    asked = Request(3, label=2, negative_prompt="blue")
    plain = Request(3, label=2)
    assert_same(
        generate(model, [asked], drawing(scale=3.0), SIZE),
        generate(model, [plain], drawing(scale=3.0), SIZE),
    )


def test_a_depth_map_is_drawn_by_and_is_never_made_up():
    model = make("depth")
    near = Request(3, depth=torch.ones(1, SIZE, SIZE))
    far = Request(3, depth=torch.zeros(1, SIZE, SIZE))
    pictures = generate(model, [near, far], drawing(), SIZE)
    assert (pictures[0] - pictures[1]).abs().max() > 1e-4
    with pytest.raises(UserError) as refused:
        generate(model, [near, Request(3, prompt="a tree")], drawing(), SIZE)
    assert refused.value.key == "checkpoint"


def test_guidance_1_ignores_the_negative_prompt(text):
    one, other = generate(
        text,
        [Request(3, prompt="red", negative_prompt="a tree"), Request(3, prompt="red")],
        drawing(scale=1.0),
        SIZE,
    )
    assert_same(one, other)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(model, training):
    """Mode, weights, gradients and torch's own generator: sampling cannot disturb training. While
    drawing, it is in evaluation mode."""
    model.train(training)
    mode = [part.training for part in model.modules()]
    assert any(mode) is training  # the frozen autoencoder never trains
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    modes = []

    def broken(*arguments):
        raise RuntimeError("broken sampler")

    pictures = generate(
        model,
        [Request(0)],
        drawing(),
        SIZE,
        lambda *seen: modes.append([part.training for part in model.modules()]),
    )
    with pytest.raises(RuntimeError, match="broken sampler"):
        generate(model, [Request(0)], drawing(broken), SIZE)
    assert modes and not any(any(seen) for seen in modes)
    assert not pictures.requires_grad
    assert [part.training for part in model.modules()] == mode
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_steps_and_grid_are_the_drawings(model):
    for grid in (trailing, leading):
        shown = []
        pictures = generate(
            model,
            [Request(0), Request(1)],
            drawing(ddim, grid=grid),
            SIZE,
            lambda step, x, x0, shown=shown: shown.append((step, x0)),
        )
        assert [step for step, _ in shown] == [0, 1, 2, 3]
        assert torch.equal(pictures, shown[-1][1].clamp(-1, 1))
    assert not torch.equal(
        generate(model, [Request(0)], drawing(ddim), SIZE),
        generate(model, [Request(0)], drawing(ddim, grid=leading), SIZE),
    )


@pytest.mark.gpu
def test_a_gpu_draws_what_the_cpu_draws(model):
    here = generate(model, requests(16), drawing(), SIZE)
    try:
        there = generate(model.to("cuda"), requests(16), drawing(), SIZE)
    finally:
        model.to("cpu")
    assert_same(
        there, here, atol=1e-2
    )  # convolutions on a GPU round to TF32, 1e-3, in each of 4 steps


def test_the_error_of_few_steps_falls_and_is_that_of_the_same_seeds(text):
    asked = requests(2)
    plain = drawing(ddim, scale=1.0)
    compared = compare_steps(text, asked, plain, SIZE, [32, 4, 8, 64])
    drawn = compared.pictures
    far = compared.distances
    assert compared.most == 64
    assert list(drawn) == [4, 8, 32, 64]
    assert list(far) == [4, 8, 32]
    for steps in (4, 8):
        assert_same(drawn[steps], generate(text, asked, replace(plain, steps=steps), SIZE))
    assert far[4].shape == (2,)
    assert far[4].mean() > 1.5 * far[8].mean() > 4 * far[32].mean() > 0
    to_the_most = (drawn[8][1] - drawn[64][1]).square().mean().sqrt().item() / 2
    assert far[8][1].item() == pytest.approx(to_the_most)


def test_samplers_that_draw_noise_are_known():
    assert (
        draws_noise(drawing(ddpm))
        and draws_noise(drawing(partial(ddim, eta=1.0)))
        and not draws_noise(drawing(ddim))
        and not draws_noise(drawing(dpmpp_2m))
    )
