"""The optimizers beside torch's AdamW: what they train, what they keep, and that a run goes on with
them in the same bits."""

import math
import shutil
from functools import partial

import pytest
import torch
import yaml
from reading import checkpoints, lines, newest, numbers, same, tensors
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from sdtrain.errors import UserError
from sdtrain.paths import config_dir
from sdtrain.training.optimisation import Constant, Optimisation
from sdtrain.training.optimizers.adafactor import Adafactor
from sdtrain.training.optimizers.adamw_8bit import adamw_8bit
from sdtrain.training.optimizers.muon import Muon
from sdtrain.training.optimizers.schedule_free import ScheduleFree
from sdtrain.training.parameter_groups import GroupSettings, matrix_names

TARGETS = {
    "adafactor": Adafactor,
    "adamw_8bit": adamw_8bit,
    "muon": Muon,
    "schedule_free": ScheduleFree,
}
DEFAULTS = {"adamw_8bit": {"min_8bit_size": 16}}  # so that the small tensors have 8 bits
PACKAGES = {"adamw_8bit": "bitsandbytes", "schedule_free": "schedulefree"}


@pytest.fixture(params=TARGETS)
def name(request) -> str:
    """Each of them whose package is installed."""
    if request.param in PACKAGES:
        pytest.importorskip(PACKAGES[request.param])
    return request.param


class Small(nn.Module):
    """A tensor of each kind: convolutions, a matrix, an embedding, biases and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 1)
        self.norm = nn.GroupNorm(2, 8)
        self.words = nn.Embedding(5, 8)
        self.linear = nn.Linear(8, 6)

    def forward(self, image, word):
        hidden = functional.silu(self.norm(self.second(self.first(image))))
        return self.linear(hidden.mean((2, 3)) + self.words(word))


class Training:
    """A small network, its optimizer, and a fixed batch."""

    def __init__(self, name: str, groups: GroupSettings | None = None, **settings) -> None:
        torch.manual_seed(0)
        self.net = Small()
        self.image = torch.randn(16, 3, 4, 4)
        self.word = torch.arange(16) % 5
        self.target = torch.randn(16, 6)
        self.optimisation = Optimisation(
            optimizer=partial(TARGETS[name], **{"lr": 0.02} | DEFAULTS.get(name, {}) | settings),
            lr_schedule=Constant(warmup_images=40),
            max_images=1000,
            gradient_clip=1.0,
            groups=groups or GroupSettings(decay_norms_and_biases=False),
            max_skipped=100,
        )
        named = {}
        for key, value in self.net.named_parameters():
            named[f"conditioner.{key}" if key.startswith("words") else key] = value
        self.optimizer = self.optimisation.configure(named, matrix_names(self.net, named))
        self.seen = 0

    def step(self, bad: bool = False) -> float:
        self.optimizer.zero_grad()
        loss = functional.mse_loss(self.net(self.image, self.word), self.target)
        loss.backward()
        if bad:
            self.net.linear.weight.grad[0, 0] = math.nan
        else:
            self.seen += 16
        self.optimisation.set_learning_rate(self.optimizer, self.seen)
        self.optimisation.clip(self.optimizer, loss.detach())
        self.optimizer.step()
        return loss.item()

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.net.state_dict().items()}


def test_ten_steps_lower_the_loss_and_a_step_that_is_not_finite_leaves_no_trace(name):
    plain = Training(name)
    losses = [plain.step() for _ in range(10)]
    assert losses[-1] < 0.8 * losses[0]
    disturbed = Training(name)
    for number in range(10):
        before = disturbed.weights()
        disturbed.step(bad=True)
        assert same(disturbed.weights(), before)
        assert disturbed.step() == losses[number]
    assert same(plain.weights(), disturbed.weights())


def test_the_state_that_a_file_holds_continues_in_the_same_bits(name, tmp_path):
    whole = Training(name)
    for _ in range(6):
        whole.step()
    first = Training(name)
    for _ in range(3):
        first.step()
    torch.save([first.net.state_dict(), first.optimizer.state_dict()], tmp_path / "state.pt")
    second = Training(name)
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    second.net.load_state_dict(weights)
    second.optimizer.load_state_dict(state)
    second.seen = first.seen
    for _ in range(3):
        second.step()
    assert same(second.weights(), whole.weights())


def test_only_linear_layers_are_orthogonalized():
    training = Training("muon", lr=0.5, adamw_lr=0.25)
    named = {id(value): key for key, value in training.net.named_parameters()}
    rates = {}
    for group in training.optimizer.param_groups:
        for parameter in group["params"]:
            rates[named[id(parameter)]] = group["lr"]
    assert {key for key, rate in rates.items() if rate == 0.5} == {"linear.weight"}
    assert set(rates.values()) == {0.5, 0.25} and len(rates) == 9
    before = training.net.linear.weight.clone()
    training.optimizer.param_groups[0]["weight_decay"] = 0.0
    training.seen = 100
    training.step()
    # Newton-Schulz leaves the singular values between 0.7 and 1.2 (Jordan et al. 2024).
    values = torch.linalg.svdvals(training.net.linear.weight - before)
    scale = 0.5 * 0.2 * math.sqrt(8)
    assert 0.6 * scale < values.min() and values.max() < 1.3 * scale


def test_an_embedding_that_a_linear_layer_shares_is_no_matrix():
    net = nn.ModuleDict({"words": nn.Embedding(5, 8), "out": nn.Linear(8, 5)})
    named = dict(net.named_parameters())
    assert matrix_names(net, named) == {"out.weight"}
    net["out"].weight = net["words"].weight
    assert matrix_names(net, dict(net.named_parameters())) == set()


def test_adafactor_keeps_a_row_and_a_column_of_every_kernel():
    """By hand: sums over rows and columns of the squared gradient as a matrix."""
    training = Training("adafactor", weight_decay=0.0)
    training.seen = 100
    before = training.net.first.weight.detach().clone()
    training.step()
    gradient = training.net.first.weight.grad
    assert gradient.shape == before.shape == training.net.first.weight.shape
    square = gradient.flatten(1).double() ** 2
    rows = square.mean(1)
    columns = square.mean(0)
    update = gradient.flatten(1) / (rows[:, None] * columns / rows.mean()).sqrt()
    update = update / max(1.0, update.square().mean().sqrt().item())
    moved = (before - training.net.first.weight.detach()).flatten(1)
    torch.testing.assert_close(moved.double(), 0.02 * update, rtol=1e-3, atol=1e-5)
    state = training.optimizer.state[training.net.first.weight]
    assert state["exp_avg_sq_row"].shape == (8,) and state["exp_avg_sq_col"].shape == (27,)


def test_the_average_of_schedule_free_is_the_mean_of_its_steps():
    """x is the mean of z at a constant rate; and looking at it does not change a bit."""
    pytest.importorskip("schedulefree")
    training = Training("schedule_free", weight_decay=0.0)
    training.seen = 100
    other = Training("schedule_free", weight_decay=0.0)
    other.seen = 100
    weight = training.net.linear.weight
    named = dict(training.net.named_parameters())
    points = []
    for _ in range(5):
        training.step()
        other.step()
        points.append(training.optimizer.state[weight]["z"].double())
        own = weight.data_ptr()
        with training.optimizer.applied(named):
            mean = torch.stack(points).mean(0)
            torch.testing.assert_close(weight.double(), mean, rtol=1e-4, atol=1e-6)
        assert weight.data_ptr() == own
    assert same(training.weights(), other.weights())
    assert set(training.optimizer.state[weight]) == {"z", "exp_avg_sq"}


OTHER = {
    "lr": 0.01,
    "weight_decay": 0.5,
    "decay_rate": -0.5,
    "clip_threshold": 0.1,
    "beta1": 0.9,
    "betas": [0.8, 0.9],
    "min_8bit_size": 32,
    "adamw_lr": 0.01,
    "momentum": 0.5,
    "nesterov": False,
    "ns_steps": 3,
    "r": 1.0,
    "text_encoder_lr": 0.01,
    "decay_norms_and_biases": False,
}


def test_every_key_of_its_yaml_has_an_effect(name):
    """On what it would save after three steps: of schedule_free that is the average."""
    text = (config_dir() / "optimizer" / f"{name}.yaml").read_text()
    node = yaml.safe_load(text)
    node = node.get("optimizer", node)
    keys = [key for key in node if not key.startswith("_")]

    def trained(**changed) -> dict[str, torch.Tensor]:
        settings = {key: node[key] for key in keys} | {"lr": 0.02} | changed
        group_keys = ("text_encoder_lr", "decay_norms_and_biases")
        groups = GroupSettings(**{key: settings.pop(key) for key in group_keys})
        training = Training(name, groups, **settings)
        for _ in range(3):
            training.step()
        if name != "schedule_free":
            return training.weights()
        with training.optimizer.applied(dict(training.net.named_parameters())):
            return training.weights()

    straight = trained()
    assert same(trained(), straight)  # the twin: with nothing changed nothing changes
    for key in keys:
        assert not same(trained(**{key: OTHER[key]}), straight), key


BAD = [
    ("adafactor", {"lr": -1.0}, "optimizer.lr"),
    ("adafactor", {"decay_rate": 0.8}, "optimizer.decay_rate"),
    ("adafactor", {"beta1": 1.0}, "optimizer.beta1"),
    ("adafactor", {"clip_threshold": 0.0}, "optimizer.clip_threshold"),
    ("adamw_8bit", {"betas": [0.9, 1.0]}, "optimizer.betas"),
    ("muon", {"adamw_lr": -0.1}, "optimizer.adamw_lr"),
    ("muon", {"momentum": 1.0}, "optimizer.momentum"),
    ("muon", {"ns_steps": 0}, "optimizer.ns_steps"),
    ("schedule_free", {"betas": [0.0, 0.9]}, "optimizer.betas"),
    ("schedule_free", {"weight_decay": -1.0}, "optimizer.weight_decay"),
]


def test_a_setting_out_of_range_is_refused_with_its_key():
    for name, settings, key in BAD:
        with pytest.raises(UserError) as caught:
            Training(name, **settings)
        assert caught.value.key == key, name


def test_what_an_optimizer_cannot_train_or_have_beside_it_is_refused(
    refused, composed, monkeypatch
):
    ema = {"_target_": "sdtrain.training.callbacks.ema.EMACallback", "decay": 0.9}
    free = composed("optimizer=schedule_free")
    assert free["callbacks"]["ema"] is None
    assert free["lr_schedule"]["_target_"].endswith(".Constant")
    averaged_twice = free | {"callbacks": {"ema": ema}}
    assert refused(config=averaged_twice).key == "callbacks.ema"
    assert refused("optimizer=schedule_free", "lr_schedule=cosine").key == "lr_schedule"
    assert refused("experiment=shapes_autoencoder", "optimizer=muon").key == "optimizer"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for option, package in PACKAGES.items():
        error = refused(f"optimizer={option}")
        assert error.key == "optimizer" and error.exit_code == 2
        assert package in str(error) and "pip install" in str(error)


TEN = [
    "trainer.max_images=80",
    "checkpoint.every=40",
    "callbacks.samples.every=80",
    "validation.every=80",
]


@pytest.mark.slow
def test_a_run_goes_on_after_half_of_its_ten_steps_in_the_same_bits(name, run_of, tmp_path):
    words = [f"optimizer={name}", "lr_schedule=constant", *TEN]
    whole = run_of("whole", *words)
    shutil.copytree(checkpoints(whole)[0], tmp_path / "again/checkpoints/000000000040")
    again = run_of("again", *words, "resume=must")
    assert same(tensors(newest(again)), tensors(newest(whole)))
    last = [line for line in numbers(again) if line["images_seen"] == 80]
    assert last == [line for line in numbers(whole) if line["images_seen"] == 80]
    losses = [line["train/loss"] for line in lines(whole) if "train/loss" in line]
    assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.slow
def test_a_run_that_goes_on_with_another_optimizer_starts_its_state_anew(
    train_tiny, run_of, tmp_path
):
    pytest.importorskip("schedulefree")
    run_of("run", "optimizer=schedule_free", "lr_schedule=constant", *TEN[1:], "optimizer.lr=0.01")
    last = ["trainer.max_images=80", "resume=must", "resume_allow=[optimizer]"]
    result = train_tiny(tmp_path / "run", "optimizer=muon", *TEN[1:], *last)
    assert result.code == 0, result.err
    state = tensors(newest(tmp_path / "run"))
    assert any(key.endswith("momentum_buffer") for key in state)
    assert not any(key.endswith("/z") for key in state)


@pytest.mark.slow
def test_looks_and_saves_leave_schedule_free_alone_and_hold_its_average(run_of, here, tmp_path):
    pytest.importorskip("schedulefree")
    words = ["optimizer=schedule_free", "lr_schedule=constant", "trainer.max_images=80"]
    often = ["callbacks.samples.every=8", "validation.every=8", "checkpoint.every=8"]
    rarely = ["callbacks.samples.every=0", "validation.every=0", "checkpoint.every=80"]
    seen = run_of("seen", *words, *often)
    unseen = run_of("unseen", *words, *rarely)
    assert same(tensors(newest(seen)), tensors(newest(unseen)))
    average = load_file(newest(seen) / "model.safetensors")
    state = torch.load(newest(seen) / "trainer.pt", weights_only=True)["optimizer_states"][0]
    assert not (newest(seen) / "ema.safetensors").exists()
    # x = y + (1 - 1 / beta1) (z - y), of the first parameter
    first = state["state"][0]
    weights = [value for value in average.values() if value.shape == first["y"].shape]
    wanted = first["y"] + (1 - 1 / 0.9) * (first["z"] - first["y"])
    assert any(torch.allclose(value, wanted, atol=1e-6) for value in weights)
    drawn = here(
        "sdtrain-sample",
        f"checkpoint={seen}",
        "steps=1",
        f"output={tmp_path / 'drawn'}",
        "prompt=a star",
    )
    assert drawn.code == 0, drawn.err
    raw = here("sdtrain-sample", f"checkpoint={seen}", "ema=false", "prompt=a star", "steps=1")
    assert raw.code == 2 and "ema" in raw.paragraph
