"""The precision of training: how auto is resolved, and where autocast applies."""

from types import SimpleNamespace

import pytest
import torch
import yaml
from reading import lines

from sdtrain.runs.layout import RunFolder
from sdtrain.training.callbacks.looks import Looks
from sdtrain.training.precision import (
    CPUMixedPrecision,
    bf16_gain,
    choose_on_cpu,
    choose_on_gpu,
    compute_precision,
)


def test_auto_takes_bf16_where_it_is_fast():
    def never() -> float:
        raise AssertionError("a CPU without bf16 needs no trial")

    assert choose_on_cpu(False, never).precision == "32-true"
    assert choose_on_cpu(True, lambda: 1.4).precision == "bf16-mixed"
    assert choose_on_cpu(True, lambda: 1.03).precision == "32-true"
    assert choose_on_cpu(True, None).precision == "bf16-mixed"
    assert choose_on_gpu("H100", True).precision == "bf16-mixed"
    assert choose_on_gpu("T4", False).precision == "32-true"


def test_the_trial_leaves_the_generator_alone():
    state = torch.get_rng_state()
    assert 0.2 < bf16_gain() < 20
    assert torch.equal(torch.get_rng_state(), state)


def test_autocast_follows_weights_that_change():
    """A look swaps averaged weights in within one block."""
    layer = torch.nn.Linear(1, 1, bias=False)
    x = torch.ones(1, 1)
    with torch.no_grad(), compute_precision("bf16-mixed", "cpu"):
        for value in (1.0, 2.0):
            layer.weight.fill_(value)
            output = layer(x)
            assert output.dtype == torch.bfloat16
            assert output.item() == value
    with compute_precision("32-true", "cpu"):
        assert layer(x).dtype == torch.float32


def test_attention_on_a_cpu_takes_no_flash_kernel():
    for context in (CPUMixedPrecision().forward_context(), compute_precision("bf16-mixed", "cpu")):
        assert torch.backends.cuda.flash_sdp_enabled()
        with context:
            assert torch.is_autocast_enabled("cpu")
            assert not torch.backends.cuda.flash_sdp_enabled()
            assert torch.backends.cuda.math_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


class AutocastLook:
    """A look that records whether autocast is on."""

    weight = 1
    on_all_ranks = True

    def look(self, trainer, module, planned, stopping) -> dict:
        self.has_autocast = torch.is_autocast_enabled("cpu")
        return {}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_looks_compute_in_the_precision_of_training(precision):
    look = AutocastLook()
    looks = Looks(
        looks={"autocast": look},
        share=None,
        precision=precision,
        stopping=SimpleNamespace(wait_for_ranks=lambda: None),
        checkpoints=None,
        metrics_log=SimpleNamespace(log_metrics=lambda *given: None),
        console=None,
    )
    module = SimpleNamespace(
        device=torch.device("cpu"), progress=SimpleNamespace(images_seen=8, batch_size=8)
    )
    looks._run_look(SimpleNamespace(is_global_zero=True), module, "autocast", None, 0.0)
    assert look.has_autocast == (precision == "bf16-mixed")


def saved_precision_of(run) -> str:
    return yaml.safe_load(RunFolder(run).config.read_text())["trainer"]["precision"]


def test_a_resumed_run_keeps_its_precision(train_tiny, tmp_path):
    for precision in ("32-true", "bf16-mixed"):
        run = tmp_path / precision
        words = ["callbacks=none", "validation=none", "trainer.max_images=16"]
        train_tiny(run, f"trainer.precision={precision}", *words)
        words[-1] = "trainer.max_images=32"
        result = train_tiny(run, "trainer.precision=auto", "resume=must", *words)
        assert result.code == 0, result.err
        assert saved_precision_of(run) == precision


def test_a_cpu_has_no_float16(refused):
    words = ["trainer.precision=16-mixed", "trainer.max_skipped=9", "optimizer.fused=false"]
    error = refused("trainer.accelerator=cpu", *words)
    assert error.key == "trainer.precision"


def test_a_saved_precision_is_checked_like_a_typed_one(train_tiny, tmp_path):
    """A run that a GPU began in float16 does not go on on a CPU."""
    words = ["callbacks=none", "validation=none", "trainer.max_images=16", "optimizer.fused=false"]
    words += ["trainer.max_skipped=9"]
    train_tiny(tmp_path, *words)
    config = RunFolder(tmp_path).config
    config.write_text(config.read_text().replace("precision: 32-true", "precision: 16-mixed"))
    more = ["trainer.precision=auto", "resume=must"]
    result = train_tiny(tmp_path, *words, *more)
    assert result.code == 2 and "trainer.precision" in result.paragraph


@pytest.mark.slow
def test_ranks_take_the_precision_of_rank_0(command, tiny, tmp_path):
    words = tiny("trainer.precision=auto", "callbacks=none", "validation=none")
    words += ["strategy=ddp", "trainer.devices=2", f"hydra.run.dir={tmp_path}/run"]
    result = command("sdtrain", *words)
    assert result.code == 0, result.err
    assert result.out.count("trainer.precision=auto: ") == 1


@pytest.mark.slow
def test_bf16_learns_on_a_cpu(run_of):
    run = run_of(
        "run",
        "trainer.precision=bf16-mixed",
        "callbacks=none",
        "validation=none",
        "trainer.max_images=640",
        "trainer.log_every=80",
    )
    losses = [line["train/loss"] for line in lines(run) if "train/loss" in line]
    assert losses[-1] < losses[0]
