"""The line that a run prints for what comes next can be pasted into a shell."""

import shlex
import subprocess
from types import SimpleNamespace

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from reading import BARE

from sdtrain.conditioning.class_label import ClassLabel
from sdtrain.conditioning.interface import Conditioner
from sdtrain.config.overrides import prepare_arguments
from sdtrain.runs.layout import RunFolder
from sdtrain.training.summary import _next_command

ODD = [
    "a red star",
    'a "red" star',
    "it's a star",
    "$HOME `id` ${seed} !x",
    "a star, a ring, [a cross] {x: y}",
    "null",
    "'quoted already'",
    '"quoted", twice',
    "['a list']",
    "a\\ back\\\\slash\\",
    "crème, 星 🌟",
    " spaces ",
    "",
    "a=b",
    "two\nlines",
]


class Reading(Conditioner):
    """A conditioner of which only `reads` matters."""

    def __init__(self, *reads: str) -> None:
        super().__init__()
        self.reads = frozenset(reads)


def next_command(
    conditioner, prompt: str, folder, averaged: bool = True, config: dict | None = None
) -> str | None:
    """As it is printed."""
    model = SimpleNamespace(conditioner=conditioner, reads=conditioner.reads)
    data = SimpleNamespace(example_prompts=lambda count: [prompt] * count)
    parts = SimpleNamespace(module=SimpleNamespace(model=model), data=data)
    prechecked = SimpleNamespace(trains_autoencoder=False)
    plan = SimpleNamespace(prechecked=prechecked, config=config or {})
    return _next_command(SimpleNamespace(folder=RunFolder(folder)), plan, parts, averaged)


def read_by_a_shell(line: str) -> list[str]:
    """The words that the command gets."""
    script = f"sdtrain-sample() {{ printf '%s\\0' \"$@\"; }}; {line}"
    result = subprocess.run(["bash", "-c", script], capture_output=True, check=True)
    return result.stdout.decode().split("\0")[:-1]


@pytest.mark.parametrize("prompt", ODD)
def test_any_prompt_and_folder_reach_the_command(tmp_path, prompt):
    folder = tmp_path / 'a "b" $c, d\'e'
    words = read_by_a_shell(next_command(Reading("caption"), prompt, folder))
    read = {}
    for override in OverridesParser.create().parse_overrides(prepare_arguments(words, "prompt")):
        value = override.value()
        texts = value if isinstance(value, list) else [value]
        plain = [str(text.text if hasattr(text, "text") else text) for text in texts]
        read[override.key_or_group] = [text.replace("\\${", "${") for text in plain]
    assert read["checkpoint"] == [str(folder)]
    assert read["prompt"] == [prompt]


def test_a_line_says_what_the_model_needs(tmp_path):
    labels = ClassLabel(num_classes=3, context_dim=2)
    words = shlex.split(next_command(labels, "x", tmp_path, averaged=False))
    assert "label=0" in words and "ema=false" in words and "prompt=x" not in words
    named = ClassLabel(num_classes=2, context_dim=2, class_names=["7", "8"])
    assert {"label=7", "label='7'"} & set(shlex.split(next_command(named, "x", tmp_path)))
    assert "ema=false" not in next_command(Reading("caption"), "x", tmp_path)
    assert next_command(Reading("depth", "caption"), "x", tmp_path) is None


def test_a_line_says_what_sdtrain_sample_cannot_know(tmp_path):
    """Whose classes the checkpoint builds."""
    config = {
        "model": {"unet": {"_target_": "mine.Net"}, "_target_": "sdtrain.latent_diffusion.X"},
        "schedule": {"_target_": "other.schedule"},
    }
    words = shlex.split(next_command(Reading("caption"), "x", tmp_path, config=config))
    assert "allow=[mine,other]" in words
    assert "allow" not in next_command(Reading("caption"), "x", tmp_path)


def test_the_line_of_an_autoencoder_is_composed(train_tiny, composed, tmp_path):
    result = train_tiny(tmp_path / "run", "experiment=shapes_autoencoder", "trainer.max_images=8")
    assert result.code == 0, result.err
    (line,) = [line for line in result.out.splitlines() if line.startswith("  next ")]
    command, *typed = shlex.split(line.removeprefix("  next"))
    assert command == "sdtrain"
    config = composed(*prepare_arguments(typed))
    assert config["data"]["image_size"] == 32
    assert config["model"]["autoencoder"]["path"] == str(tmp_path / "run" / "autoencoder")


def test_the_printed_line_draws(train_tiny, here, tmp_path):
    """Of a run without an average, whose prompt a shell would take apart."""
    run = tmp_path / "a run, it's"
    words = ["model/conditioner=class_label", *BARE, "trainer.max_images=8"]
    result = train_tiny(run, *words)
    assert result.code == 0, result.err
    (line,) = [line for line in result.out.splitlines() if line.startswith("  next ")]
    typed = shlex.split(line.removeprefix("  next"))
    assert here(typed[0], *typed[1:], "num_images=1", "steps=2", cwd=tmp_path).code == 0
    assert (tmp_path / "samples" / "00000-seed0.png").is_file()
