"""Each number, word and switch of a configuration, changed: something must change with it."""

import copy
import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from reading import numbers

from sdtrain.assemble.drawing import build_drawing
from sdtrain.assemble.objective import build_objective, build_schedule
from sdtrain.config.build import build
from sdtrain.config.precheck import DIFFUSION_ONLY
from sdtrain.diffusion.guidance import CONDITIONED, NOTHING, UNCONDITIONED
from sdtrain.paths import config_dir
from sdtrain.randomness import KeyedRandom
from sdtrain.runs.resume import flatten

UNSEEN = {  # keys that rightly change nothing here, and why
    "data.num_workers": "speed alone",
    "data.timeout": "see test_input_watch.py",
    "data.cache": "not for shapes; see test_cached_runs.py",
    "cache": "the same",
    "trainer.threads": "speed alone",
    "optimizer.fused": "speed alone",
    "trainer.accelerator": "the machine's",
    "trainer.devices": "see test_ranks.py",
    "trainer.deterministic": "see test_gpu.py",
    "trainer.probe": "see test_probe.py",
    "strategy": "see test_ranks.py",
    "logger": "see test_loggers.py",
    "resume": "see test_runs.py",
    "resume_allow": "see test_resume.py",
    "checkpoint.max_failed_saves": "see test_checkpoints.py",
    "callbacks.noise_levels.num_images": "with every=0; see test_noise_level_validation.py",
    "sweep": "see test_sweep.py",
    "first_stage": "not for shapes",
    "name": "names the folder",
    "callbacks.samples.prompts": "a list",
    "model.unet.context_dim": "follows the conditioner's",
    "model.unet.latent_channels": "follows the autoencoder's",
    "model.autoencoder.latent_channels": "must be the weights'",
    "model.autoencoder.downsampling": "must be the weights'",
    "model.autoencoder.sha256": "must be the weights'",
    "model.autoencoder.path": "must exist",
    "model.conditioner.tokenizer": "must exist",
    **dict.fromkeys(DIFFUSION_ONLY, "see the test of the mathematics"),
}
STEPPED = {  # seen in the first batches and in the weights after three steps
    "seed": 1,
    "data.seed": 1,
    "data.size": 40,
    "data.image_size": 40,
    "data.validation_size": 12,
    "data.batch_size": 16,
    "model.caption_dropout": 0.9,
    "model.autoencoder.latent_scale": 1.1,
    "model.unet.block_channels": "[16,24]",
    "model.unet.attention": "[true,false]",
    "model.unet.head_dim": 16,
    "model.unet.norm_groups": 4,
    "model.unet.layers_per_block": 2,
    "model.conditioner.layers": 2,
    "model.conditioner.heads": 1,
    "model.conditioner.context_dim": 24,
    "model.conditioner.max_length": 8,
    "trainer.gradient_clip": 0.01,
    "optimizer.lr": 2e-3,
    "optimizer.betas": "[0.8,0.9]",
    "optimizer.weight_decay": 0.1,
    "optimizer.text_encoder_lr": 2e-3,
    "optimizer.decay_norms_and_biases": "false",
    "lr_schedule.warmup_images": 24,
    "lr_schedule.final_factor": 0.5,
}
SHORT = [  # three steps, looked at after the last
    "trainer.max_images=24",
    "data.size=16",
    "trainer.log_every=8",
    "checkpoint.every=8",
    "callbacks.samples.every=24",
    "validation.every=24",
]
LEFT = {  # seen in what a run leaves behind
    "steps": 3,
    "guidance_scale": 1.5,
    "trainer.precision": "bf16-mixed",
    "trainer.accumulate": 2,
    "trainer.max_images": 16,
    "trainer.max_minutes": 1e-6,
    "trainer.max_skipped": 3,
    "trainer.log_every": 16,
    "checkpoint.keep": 3,
    "checkpoint.every": 16,
    "callbacks.ema.decay": 0.1,
    "callbacks.samples.every": 16,
    "callbacks.samples.num_images": 3,
    "callbacks.samples.strip_steps": 2,
    "callbacks.samples.seed": 1,
    "callbacks.samples.guidance_scales": "[1,2]",
    "callbacks.samples.sampler_steps": "[2,4]",
    "callbacks.samples.attention": 2,
    "callbacks.noise_levels.every": 24,
    "looks.share": 0.001,
    "validation.every": 16,
    "validation.num_images": 8,
}


def below(key: str, parents) -> bool:
    return any(key == parent or key.startswith(f"{parent}.") for parent in parents)


def leaves(cfg: dict) -> dict:
    """{key: value} of what has an effect."""
    found = {}
    for key, value in flatten(cfg):
        if isinstance(value, dict) or key.endswith(("_target_", "_partial_")):
            continue
        if not below(key, UNSEEN):
            found[key] = value
    return found


def other(value, given):
    """Another value than that: the opposite of a switch, else what is given."""
    return str(not value).lower() if isinstance(value, bool) else given


def test_every_key_has_another_value(composed, tiny):
    for key, value in leaves(composed(*tiny())).items():
        assert isinstance(value, bool) or key in STEPPED.keys() | LEFT.keys(), key


def trained_three_steps(parts) -> str:
    """A digest of three batches, of what is held out, and of the weights after three steps."""
    found = hashlib.sha256()

    def add(tensor) -> None:
        if tensor is not None:
            found.update(f"{list(tensor.shape)}".encode())
            found.update(tensor.detach().double().numpy().tobytes())

    module = parts.module
    one_rank = SimpleNamespace(reduce=lambda value, **_: value)
    module.trainer = SimpleNamespace(strategy=one_rank)
    optimizer = module.configure_optimizers()
    stream = iter(parts.datamodule.train_dataloader())
    for place in range(3):
        batch = next(stream)
        for drawn in (batch.image, batch.noise, batch.u, batch.drop):
            add(drawn)
        module.progress.images_seen = batch.stream_end
        optimizer.zero_grad()
        loss = module.training_step(batch, place)
        add(loss)
        loss.backward()
        module.configure_gradient_clipping(optimizer)
        optimizer.step()
    for weight in module.state_dict().values():
        add(weight)
    for batch in parts.datamodule.validation_batches(64):
        add(batch.image)
    return found.hexdigest()


@pytest.mark.slow
def test_every_key_of_data_model_and_optimizer_has_an_effect(
    planned, built, composed, tiny, tiny_config
):
    def digest(*words: str) -> str:
        typed = ["data.num_workers=0", *words]
        plan = planned(*tiny(*typed), config=tiny_config(*typed))
        return trained_three_steps(built(plan))

    straight = digest()
    assert digest() == straight  # the twin: with nothing changed nothing changes
    cfg = leaves(composed(*tiny()))
    for key, value in cfg.items():
        if key in LEFT or not below(key, {each.partition(".")[0] for each in STEPPED}):
            continue
        assert digest(f"{key}={other(value, STEPPED.get(key))}") != straight, key


def left_behind(run) -> dict[str, str]:
    """What a run leaves behind, without clocks: name -> digest."""
    left = {"metrics.jsonl": json.dumps(numbers(run))}
    for path in sorted(run.rglob("*")):
        if path.suffix in (".png", ".safetensors"):
            left[str(path.relative_to(run))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return left


@pytest.mark.slow
def test_every_key_of_a_run_has_an_effect(run_of, composed, tiny):
    def digest(name: str, *words: str) -> dict[str, str]:
        return left_behind(run_of(name, *SHORT, *words))

    straight = digest("straight")
    assert digest("again") == straight  # the twin: with nothing changed nothing changes
    for key, value in leaves(composed(*tiny())).items():
        if key not in LEFT and below(key, {each.partition(".")[0] for each in STEPPED}):
            continue
        assert digest(key, f"{key}={other(value, LEFT.get(key))}") != straight, key


# The mathematics


def option_files() -> list[str]:
    """GROUP/NAME of each option of the mathematics."""
    found = []
    for group in (*DIFFUSION_ONLY, "modifiers"):
        names = (path.stem for path in (config_dir() / group).glob("*.yaml"))
        found += [f"{group}/{name}" for name in names if name != "none"]
    return sorted(found)


OPTIONS = option_files()
WIDE = {  # in which the bounds of a grid lie
    "_target_": "sdtrain.schedules.geometric.geometric",
    "sigma_min": 0.0001,
    "sigma_max": 1000.0,
    "num_timesteps": 1000,
}
BESIDE = {  # what an option wants beside it: KEY in its group, and other groups
    "schedule/table": ({"betas": [0.001, 0.01, 0.1, 0.2, 0.3, 0.5], "num_timesteps": 6}, {}),
    "schedule/flow": ({}, {"prediction": {"_target_": "sdtrain.diffusion.prediction.V"}}),
    "modifiers/zero_terminal_snr": (
        {},
        {"prediction": {"_target_": "sdtrain.diffusion.prediction.V"}},
    ),
    "modifiers/clip": ({"log_snr_max": 4.0, "log_snr_min": -4.0}, {}),
}


def with_option(cfg: dict, option: str) -> dict:
    """The configuration with that option of configs/, by its file."""
    group, _, name = option.partition("/")
    node = yaml.safe_load((config_dir() / f"{option}.yaml").read_text())
    node = node.get(name if group == "modifiers" else group, node)
    values, groups = BESIDE.get(option, ({}, {}))
    node |= values
    chosen = {group: {name: node} if group == "modifiers" else node}
    return copy.deepcopy(cfg) | groups | chosen


def fingerprint(cfg: dict) -> list[float]:
    """What the mathematics of a configuration does to fixed numbers: losses of a fixed network, the
    law of the noise, pictures drawn.
    """
    count = 32
    generator = torch.Generator().manual_seed(0)
    x0, x = torch.randn(2, count, 2, 4, 4, generator=generator)
    u = torch.rand(count, generator=generator, dtype=torch.float64)
    objective = build_objective(cfg)
    schedule = objective.schedule
    drawing = build_drawing(cfg | {"steps": 6, "guidance_scale": 2.0}, schedule)
    keyed = KeyedRandom(0, "noise")
    law = build(cfg["noise"], "noise")
    noise = []
    added = []
    for ordinal in range(count):
        eps, more = law(lambda shape, index, o=ordinal: keyed.normal(o, shape, index), (2, 4, 4))
        noise.append(eps)
        added.append(eps if more is None else more)
    losses = objective(
        lambda x, timestep: 3 * (x + timestep[:, None, None, None] / 1000).sin(),
        x0,
        torch.from_numpy(np.stack(noise)),
        u,
        torch.from_numpy(np.stack(added)),
    )
    denoisers = {
        CONDITIONED: lambda x, t: x.sin() * 6,
        UNCONDITIONED: lambda x, t: x.cos(),
        NOTHING: lambda x, t: x.abs(),
    }
    denoise = drawing.guidance(denoisers, drawing.guidance_scale, schedule)
    times = drawing.grid(drawing.steps, schedule)
    picture = drawing.sampler(denoise, x, times, schedule, lambda step: x0.roll(step, 0))
    # Read where batches are made, see test_draws.py.
    strata = [float(build(cfg["times"], "times").stratified)]
    return [*losses.per_sample.tolist(), *losses.t.tolist(), *picture.flatten().tolist(), *strata]


def changed(key: str, value):
    """Another value of a key of the mathematics."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value // 2
    if isinstance(value, float):
        return value * 0.5 if value else 0.1
    return {"log_snr_min": -1.0, "log_snr_max": 1.0}[key]


@pytest.mark.parametrize("option", OPTIONS)
def test_every_key_of_the_mathematics_has_an_effect(option, composed):
    group, _, name = option.partition("/")
    base = composed() | ({"schedule": WIDE} if group == "grid" else {})
    if group != "weighting":
        base |= {"weighting": {"_target_": "sdtrain.diffusion.weighting.simple.Simple"}}
    cfg = with_option(base, option)
    node = cfg[group][name] if group == "modifiers" else cfg[group]
    straight = fingerprint(cfg)
    assert fingerprint(cfg) == straight  # the twin: with nothing changed nothing changes
    for key, value in node.items():
        if key.startswith("_") or option == "schedule/table":  # a table's keys: see tests/schedules
            continue
        if key == "continuous" and not build_schedule(cfg).discrete:
            continue
        moved = copy.deepcopy(cfg)
        of_key = moved[group][name] if group == "modifiers" else moved[group]
        of_key[key] = changed(key, value)
        assert fingerprint(moved) != straight, key
