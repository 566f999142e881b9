"""Strict configuration: a typo, a wrong type or a missing argument is one paragraph that names the
key, and exit code 2.
"""

import sys

import pytest
import torch
import yaml
from reading import BARE, with_values

from sdtrain.config.check import Checker
from sdtrain.errors import UserError
from sdtrain.runs.manifest import list_checkpoints
from sdtrain.training.parts import saved_config

COMPOSED = [  # what is typed, and what the paragraph must say
    ("data=images data.path=x data.bucket_steps=8", ["'data.bucket_step'"]),
    ("modl=x", ["'modl'", "'model'"]),
    ("optimizer.lrr=1", ["'optimizer.lrr'", "'optimizer.lr'"]),
    ("+sed=3", ["'sed'", "'seed'"]),
    ("~sede", ["'sede'", "'seed'"]),
    ("model/unet=smal", ["model/unet=smal", "'small'"]),
    ("schedule=cosin", ["schedule=cosin", "'cosine'"]),
    ("experiment=shaps", ["experiment=shaps", "'shapes'"]),
    ("logger=wandb logger.mode=of", ["logger.mode=", "'offline'"]),
    ("model.unet.block_channels=[16", ["model.unet.block_channels=[16"]),
    ("seed", ["'seed'", "key=value"]),
    ("model.unet.context_dim=${nope}", ["model.unet.context_dim", "nope"]),
    ("schedule=none", ["schedule"]),
    ("model/autoencoder=folder", ["model.autoencoder.path"]),
    (
        "callbacks.samples.sampler_steps=[50,100] sampler=ddpm",
        ["callbacks.samples.sampler_steps", "sampler=ddim"],
    ),
]
CHANGES = [  # of single keys: added, or removed
    ("+optimizer.lrr=1", ["'optimizer.lrr'", "'lr'"]),
    ("+model.unet.layers_per_blok=2", ["'model.unet.layers_per_blok'", "'layers_per_block'"]),
    ("+callbacks.samples.promts=null", ["'callbacks.samples.promts'", "'prompts'"]),
    ("+data.batch_sise=3", ["'data.batch_sise'", "'batch_size'"]),
    ("+checkpoint.evry=3", ["'checkpoint.evry'", "every"]),
    ("~model.caption_dropout", ["model.caption_dropout"]),
    ("~lr_schedule.warmup_images", ["lr_schedule.warmup_images"]),
    ("~optimizer", ["optimizer"]),
    ("+callbacks.samples.run_dir=x", ["callbacks.samples.run_dir", "fills it in"]),
    ("+model.objective=x", ["model.objective", "fills it in"]),
]
VALUES = [  # of keys that are there
    ("seed=abc", ['seed="abc"', "integer"]),
    ("seed=1.5", ["seed=1.5", "integer"]),
    ("seed=true", ["seed=true", "integer"]),
    ("seed=null", ["seed=null", "integer"]),
    ("optimizer.lr=abc", ['optimizer.lr="abc"', "number"]),
    ("optimizer.betas=[0.9]", ["optimizer.betas=[0.9]"]),
    ("model.unet.layers_per_block=1.5", ["model.unet.layers_per_block=1.5", "integer"]),
    ("model.unet.block_channels=16", ["model.unet.block_channels=16"]),
    ("model.unet.attention=[1,1]", ["model.unet.attention=[1, 1]", "boolean"]),
    ("trainer.precision=fp16", ['trainer.precision="fp16"', "'bf16-mixed'"]),
    ("resume=maybe", ['resume="maybe"', "'auto'"]),
    ("checkpoint.every=abc", ["checkpoint.every", "integer"]),
    ("data.batch_size=eight", ['data.batch_size="eight"', "integer"]),
    ("model.unet._target_=nowhere.UNet", ["model.unet._target_", "nowhere.UNet"]),
    ("trainer.max_images=0", ["trainer.max_images=0"]),
    ("checkpoint.keep=1", ["checkpoint.keep=1"]),
    ("steps=2000", ["steps=2000", "1000"]),
    ("sampler.eta=2", ["sampler.eta=2"]),
    ("callbacks.ema.decay=2", ["callbacks.ema.decay=2"]),
    ("callbacks.samples.every=-1", ["callbacks.samples.every=-1"]),
    ("callbacks.samples.sampler_steps=[50]", ["callbacks.samples.sampler_steps=[50]"]),
    ("callbacks.samples.sampler_steps=[50,5000]", ["callbacks.samples.sampler_steps", "5000"]),
    ("validation.num_images=0", ["validation.num_images=0"]),
    ("lr_schedule.warmup_images=-1", ["lr_schedule.warmup_images=-1"]),
    ("trainer.accelerator=tpu", ["trainer.accelerator", "'cpu'"]),
    ("trainer.accelerator=gpu", ["trainer.accelerator=gpu"]),
    ("trainer.devices=2", ["trainer.devices=2", "strategy=ddp"]),
    ("trainer.accumulate=3", ["trainer.accumulate", "data.batch_size=8"]),
    ("model.conditioner.heads=3", ["model.conditioner.heads=3"]),
]


def assert_says(error: UserError, said: list[str]) -> None:
    assert error.exit_code == 2
    for part in said:
        assert part in str(error)


@pytest.mark.parametrize(("words", "said"), COMPOSED, ids=[words for words, _ in COMPOSED])
def test_words_that_fit_no_configuration_are_refused_with_the_nearest(refused, words, said):
    assert_says(refused(*words.split()), said)


@pytest.mark.parametrize(("word", "said"), CHANGES, ids=[word for word, _ in CHANGES])
def test_a_key_too_many_or_too_few_is_refused(refused, composed, word, said):
    """As "+sed=3" and "~sede" are above, but without asking Hydra again."""
    assert_says(refused(word, config=with_values(composed(), word)), said)


@pytest.mark.parametrize(("word", "said"), VALUES, ids=[word for word, _ in VALUES])
def test_a_value_that_does_not_fit_its_key_is_refused(refused, composed, tiny, word, said):
    if word == "trainer.accelerator=gpu" and torch.cuda.is_available():
        pytest.skip("this machine has one")
    assert_says(refused(word, config=with_values(composed(*tiny()), word)), said)


def test_the_same_words_spelt_right_are_taken(planned, tiny):
    plan = planned(
        *tiny("++model.unet.layers_per_block=2", "optimizer.lr=1", "seed=3", "++steps=3")
    )
    assert plan.config["model"]["unet"]["layers_per_block"] == 2
    assert plan.config["optimizer"]["lr"] == 1
    assert (plan.config["seed"], plan.config["steps"]) == (3, 3)


def test_adding_a_key_that_is_there_says_so(refused):
    error = refused("+seed=3")
    assert error.key == "seed" and "There is no key" not in str(error)


def test_the_command_refuses_in_one_paragraph(here, tmp_path):
    """A wrong value. What is composed wrong: see tests/config/test_launch.py."""
    result = here("sdtrain", "optimizer.lr=abc", "logger=none", cwd=tmp_path)
    assert result.code == 2
    assert "optimizer.lr" in result.paragraph
    assert not list(tmp_path.iterdir())


def test_a_signature_is_a_schema():
    def target(*, width: int, rate: float = 1.0, names: list[str] | None = None) -> None: ...

    Checker(()).call({"width": 3, "rate": 1, "names": ["a"]}, "it", target)
    for node, said in [
        ({}, "it.width"),
        ({"width": 3.5}, "it.width=3.5"),
        ({"width": True}, "it.width=true"),
        ({"width": "3"}, 'it.width="3"'),
        ({"width": None}, "it.width=null"),
        ({"width": 3, "rate": "fast"}, "it.rate"),
        ({"width": 3, "names": "a"}, "it.names"),
        ({"width": 3, "names": [1]}, "it.names"),
        ({"width": 3, "_target_": "sdtrain.x", "widht": 3}, "Did you mean 'width'?"),
    ]:
        with pytest.raises(UserError) as error:
            Checker(()).call(node, "it", target)
        assert said in str(error.value)


def test_own_targets_reject_kwargs():
    def target(**anything) -> None: ...

    with pytest.raises(AssertionError):
        Checker(()).call({"_target_": "sdtrain.x"}, "it", target)


NETWORK = '''"""A network of one's own."""

import torch
from torch import Tensor, nn


class Mine(nn.Module):
    """Convolutions that are shifted by time and caption."""

    def __init__(self, *, width: int = 8, latent_channels: int) -> None:
        super().__init__()
        self.inward = nn.Conv2d(latent_channels, width, 3, padding=1)
        self.time = nn.Linear(1, width)
        self.words = nn.Linear(16, width)
        self.outward = nn.Conv2d(width, latent_channels, 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        shift = self.time(timestep[:, None] / 1000) + self.words(context.mean(1))
        return self.outward(torch.relu(self.inward(x) + shift[:, :, None, None]))


class Wrong(Mine):
    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return super().forward(x, timestep, context).mean(1)


class Failing(Mine):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return x
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A user's own package that Python finds."""
    (tmp_path / "packages" / "networks_of_mine").mkdir(parents=True)
    (tmp_path / "packages" / "networks_of_mine" / "__init__.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    yield "networks_of_mine"
    sys.modules.pop("networks_of_mine", None)


@pytest.fixture
def of_mine(tiny, package):
    """of_mine("seed=1", ...): a run of that network."""

    def words(*more: str) -> list[str]:
        short = tiny(*BARE, "trainer.max_images=8")
        kept = [word for word in short if not word.startswith("model.unet.")]
        return [*kept, f"model.unet._target_={package}.Mine", *more]

    return words


def test_a_network_of_ones_own_trains_and_its_checkpoint_is_drawn_from_on_request_alone(
    here, of_mine, tmp_path, package
):
    run = tmp_path / "run"
    output = tmp_path / "output"
    result = here("sdtrain", *of_mine("+model.unet.width=12"), f"hydra.run.dir={run}")
    assert result.code == 0, result.err
    for said in ("model.unet", "context_dim", "block_channels", "left out"):
        assert said in result.out
    cfg = yaml.safe_load((run / "config.yaml").read_text())
    target = f"{package}.Mine"
    assert cfg["model"]["unet"] == {"_target_": target, "latent_channels": 4, "width": 12}
    assert list_checkpoints(run)

    asked = [
        "sdtrain-sample",
        f"checkpoint={run}",
        "prompt=a red star",
        "ema=false",
        "num_images=1",
        "steps=2",
        "accelerator=cpu",
        f"output={output}",
    ]
    sys.modules.pop(package)
    result = here(*asked)
    assert result.code == 2 and f"allow=[{package}]" in result.paragraph
    assert package not in sys.modules and not output.exists()
    result = here(*asked, f"allow=[{package}]")
    assert result.code == 0, result.err
    assert package in sys.modules and len(list(output.glob("*-seed0.png"))) == 1


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("+model.unet.widht=3", ["'model.unet.widht'", "'width'"]),
        ("model.unet.norm_groups=8", ["'model.unet.norm_groups'"]),
        ("+model.unet.width=wide", ['model.unet.width="wide"', "integer"]),
        ("model.unet._target_=networks_of_mine.Wrong", ["[2, 4, 8, 8]", "[2, 8, 8]"]),
        ("model.unet._target_=networks_of_mine.Failing", ["model.unet", "TypeError"]),
        ("model.unet._target_=networks_of_mine.Nobody", ["model.unet._target_", "Nobody"]),
        ("model.unet._target_=networks_of_mine.torch.pi", ["model.unet._target_"]),
    ],
)
def test_a_network_of_ones_own_that_does_not_fit_is_refused(refused, composed, of_mine, word, said):
    """Before anything is trained."""
    config = with_values(composed(*of_mine()), word)
    assert_says(refused(*of_mine(word), config=config), said)


def test_another_optimizer_gets_what_it_takes(planned):
    plan = planned("optimizer._target_=torch.optim.SGD", "+optimizer.momentum=0.9")
    assert any("SGD does not take betas" in note for note in plan.notes)
    optimizer = plan.optimisation().configure({"unet.weight": torch.nn.Parameter(torch.zeros(2))})
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.param_groups[0]["momentum"] == 0.9
    assert "betas" not in yaml.safe_load(saved_config(plan))["optimizer"]
