"""Every file under configs/ composes, and what it offers runs two steps. A new file is picked up by
itself.
"""

import copy
import hashlib
import json

import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from PIL import Image

from sdtrain.assemble.drawing import build_drawing
from sdtrain.assemble.objective import build_objective, build_schedule
from sdtrain.config.build import build
from sdtrain.config.check import Checker, import_target
from sdtrain.config.precheck import precheck_config
from sdtrain.config.trusted import iterate_targets
from sdtrain.data.emoji import find_fonts
from sdtrain.diffusion.guidance import CONDITIONED, UNCONDITIONED
from sdtrain.errors import UserError
from sdtrain.paths import config_dir
from sdtrain.randomness import KeyedRandom
from sdtrain.runs.manifest import list_checkpoints
from sdtrain.runs.resume import flatten
from sdtrain.training.plan import make_plan

FILES = sorted(
    path.relative_to(config_dir()).with_suffix("").as_posix()
    for path in config_dir().rglob("*.yaml")
)
GROUPS_OF_DIFFUSION = (
    "schedule",
    "prediction",
    "weighting",
    "loss",
    "times",
    "noise",
    "sampler",
    "grid",
    "guidance",
)
FOR_AN_AUTOENCODER = [
    "model/autoencoder",
    "callbacks/autoencoder",
    *(f"{group}/none" for group in GROUPS_OF_DIFFUSION),
]
OF_EVALUATE = [file for file in FILES if file.startswith("metric/")]
NOT_OF_THE_DEFAULT_RUN = (*FOR_AN_AUTOENCODER, *OF_EVALUATE)
OPTIONS = [file for file in FILES if "/" in file and file not in NOT_OF_THE_DEFAULT_RUN]
BESIDE = {  # what an option wants beside it
    "data/emoji": ["model/autoencoder=pixels", "data.image_size=16"],
    "data/images": ["model/autoencoder=pixels", "data.image_size=16", "data.path={pictures}"],
    "model/autoencoder/pixels": ["data.image_size=16"],
    "model/autoencoder/folder": ["model.autoencoder.path=data/shapes_autoencoder"],
    "experiment/images_autoencoder": ["data.path={pictures}"],
    "schedule/table": ["schedule.betas=[0.001,0.01,0.1,0.2,0.3,0.5]", "schedule.num_timesteps=6"],
    "schedule/flow": ["prediction=v"],
    "modifiers/zero_terminal_snr": ["prediction=v"],
    "modifiers/clip": ["modifiers.clip.log_snr_max=4", "modifiers.clip.log_snr_min=-4"],
}
LONG = [option for option in OPTIONS if "emoji" in option]


def chosen(config: str = "train") -> list[str]:
    """The options that the default run is made of."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        choices = compose(config, return_hydra_config=True).hydra.runtime.choices
    return sorted(
        f"{group}/{name}"
        for group, name in choices.items()
        if not group.startswith("hydra") and f"{group}/{name}" in FILES
    )


DEFAULT = chosen()
# tests/training/test_loggers.py, tests/sweep, tests/training/test_ranks.py
ELSEWHERE = [
    *(option for option in OPTIONS if option.startswith(("logger/", "sweep/"))),
    "strategy/ddp",
]
OTHERS = [option for option in OPTIONS if option not in [*DEFAULT, *LONG, *ELSEWHERE]]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of 40 small pictures with captions."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(40):
        Image.new("RGB", (40, 36), (6 * i, 255 - 6 * i, 100)).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"colour number {i}")
    return folder


def choice(option: str, pictures) -> list[str]:
    group, _, name = option.rpartition("/")
    return [
        f"{group}=[{name}]" if group == "modifiers" else f"{group}={name}",
        *(word.format(pictures=pictures) for word in BESIDE.get(option, [])),
    ]


def test_the_walk_finds_them():
    assert {
        "train",
        "sample",
        "evaluate",
        "data/shapes",
        "model/unet/small",
        "schedule/none",
        "experiment/shapes",
    } <= set(FILES)


@pytest.mark.parametrize("file", FILES)
def test_every_target_exists(file):
    text = (config_dir() / f"{file}.yaml").read_text()
    for target in iterate_targets(yaml.safe_load(text)):
        assert target.startswith(("sdtrain.", "torch."))
        import_target({"_target_": target}, file)


@pytest.mark.parametrize("option", [*LONG, *ELSEWHERE])  # the others are checked as they run
def test_the_options_that_run_elsewhere_pass_the_check(option, composed, pictures):
    words = choice(option, pictures)
    plan = make_plan(precheck_config(composed(*words), words))
    assert plan.notes == ()


def finishes(run, words, folder) -> None:
    result = run(
        "sdtrain",
        *words,
        "trainer.max_images=16",
        "checkpoint.every=1000",
        f"hydra.run.dir={folder}",
    )
    assert result.code == 0, result.err
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    assert [checkpoint.name for checkpoint in list_checkpoints(folder)] == ["000000000016"]


@pytest.mark.slow
@pytest.mark.parametrize("option", OTHERS)
def test_every_option_runs_two_steps(option, here, tiny, pictures, tmp_path):
    finishes(here, tiny(*choice(option, pictures)), tmp_path / "run")


def test_the_default_options_run_two_steps(here, tiny, tmp_path):
    assert {
        "data/shapes",
        "model/unet/small",
        "schedule/scaled_linear",
        "logger/wandb",
        "experiment/shapes",
    } <= set(DEFAULT)
    finishes(here, tiny(), tmp_path / "run")


@pytest.mark.parametrize("option", FOR_AN_AUTOENCODER)
def test_what_is_for_an_autoencoder_is_refused_for_a_diffusion_model(option, here, tiny, tmp_path):
    group, _, name = option.rpartition("/")
    result = here("sdtrain", *tiny(f"{group}={name}"), f"hydra.run.dir={tmp_path}/run")
    assert result.code == 2 and group in result.paragraph


@pytest.mark.slow
@pytest.mark.skipif(not find_fonts(), reason="no colour emoji font")
@pytest.mark.parametrize("option", LONG)
def test_emoji(option, command, tiny, tmp_path):
    stage = ["first_stage.max_images=16"] if option == "experiment/emoji" else []
    finishes(command, tiny(*choice(option, None), *stage), tmp_path / "run")
    if option != "data/emoji":
        assert (
            tmp_path
            / "run"
            / ("first_stage/autoencoder" if stage else "autoencoder")
            / "config.json"
        ).is_file()


@pytest.mark.parametrize("config", ["sample", "evaluate"])
def test_the_other_commands_compose(config, composed):
    cfg = composed("checkpoint=x", config=config)
    for name in ("sampler", "grid", "guidance"):
        Checker(()).node(cfg[name], name)
    for sampler in (config_dir() / "sampler").glob("*.yaml"):
        composed("checkpoint=x", f"sampler={sampler.stem}", config=config)


# Each number, word and switch of the default run, changed: something that the run leaves behind
# must change with it.
UNSEEN = {  # keys that rightly change nothing here, and why
    "data.num_workers": "speed alone",
    "data.timeout": "see test_input_watch.py",
    "trainer.threads": "speed alone",
    "optimizer.fused": "speed alone",
    "trainer.accelerator": "the machine's",
    "trainer.devices": "see test_ranks.py",
    "trainer.deterministic": "see test_gpu.py",
    "strategy": "see test_ranks.py",
    "logger": "see test_loggers.py",
    "resume": "see test_runs.py",
    "resume_allow": "see test_resume.py",
    "guidance.rescale": "behind max_std where nothing is learned yet; see the mathematics",
    "guidance.log_snr_max": "the same",
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
}
CHANGED = {
    "seed": 1,
    "steps": 3,
    "guidance_scale": 1.5,
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
    "schedule.beta_start": 0.001,
    "schedule.beta_end": 0.02,
    "schedule.num_timesteps": 500,
    "weighting.max_weight": 0.5,
    "guidance.log_snr_min": -1.0,
    "guidance.max_std": 0.5,
    "sampler.eta": 1.0,
    "trainer.precision": "bf16-mixed",
    "trainer.accumulate": 2,
    "trainer.gradient_clip": 0.01,
    "trainer.max_images": 48,
    "trainer.max_minutes": 1e-6,
    "trainer.max_skipped": 3,
    "trainer.log_every": 8,
    "optimizer.lr": 2e-3,
    "optimizer.betas": "[0.8,0.9]",
    "optimizer.weight_decay": 0.1,
    "lr_schedule.warmup_images": 24,
    "lr_schedule.final_factor": 0.5,
    "checkpoint.keep": 3,
    "checkpoint.every": 8,
    "callbacks.ema.decay": 0.1,
    "callbacks.samples.every": 16,
    "callbacks.samples.num_images": 3,
    "callbacks.samples.strip_steps": 2,
    "callbacks.samples.seed": 1,
    "callbacks.samples.guidance_scales": "[1,2]",
    "callbacks.samples.sampler_steps": "[2,4]",
    "callbacks.noise_levels.every": 32,
    "looks.share": 0.001,
    "validation.every": 16,
    "validation.num_images": 8,
}


def has_stale_lock(run) -> dict[str, str]:
    """What a run leaves behind, without clocks: name -> digest."""
    left = {}
    for path in sorted(run.rglob("*")):
        if path.is_file() and path.name == "metrics.jsonl":
            lines = [
                {
                    k: v
                    for k, v in json.loads(line).items()
                    if not k.endswith(("seconds", "per_second"))
                }
                for line in path.read_text().splitlines()
            ]
            left["metrics.jsonl"] = json.dumps(lines)
        elif path.suffix in (".png", ".safetensors"):
            left[path.relative_to(run).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return left


@pytest.mark.slow
def test_every_key_has_an_effect(here, tiny, composed, tmp_path):
    cfg = dict(flatten(composed(*tiny())))
    leaves = [
        key
        for key, value in cfg.items()
        if not isinstance(value, dict) and not key.endswith(("_target_", "_partial_"))
    ]
    leaves = [
        key
        for key in leaves
        if not any(key == unseen or key.startswith(f"{unseen}.") for unseen in UNSEEN)
    ]

    def digest(name, *words):
        result = here("sdtrain", *tiny(*words), f"hydra.run.dir={tmp_path}/{name}")
        assert result.code == 0, (name, result.err)
        return has_stale_lock(tmp_path / name)

    straight = digest("straight")
    assert digest("again") == straight  # the twin: with nothing changed nothing changes
    dead = []
    for key in leaves:
        value = CHANGED.get(key, str(not cfg[key]).lower() if isinstance(cfg[key], bool) else None)
        assert value is not None, f"{key} has no other value in CHANGED"
        if digest(key, f"{key}={value}") == straight:
            dead.append(key)
    assert not dead


OF_THE_MATHEMATICS = [
    option for option in OPTIONS if option.partition("/")[0] in (*GROUPS_OF_DIFFUSION, "modifiers")
]


def fingerprint(cfg) -> list[float]:
    """What the mathematics of a configuration does to fixed numbers: losses of a fixed network, the
    law of the noise, pictures drawn.
    """
    generator = torch.Generator().manual_seed(0)
    x0, x = torch.randn(2, 64, 2, 4, 4, generator=generator)
    u = torch.rand(64, generator=generator, dtype=torch.float64)
    objective, drawing, keyed = (
        build_objective(cfg),
        build_drawing(cfg | {"steps": 6, "guidance_scale": 2.0}, build_schedule(cfg)),
        KeyedRandom(0, "noise"),
    )
    law = build(cfg["noise"], "noise")
    drawn = [
        law(lambda shape, index, o=o: keyed.normal(o, shape, index), (2, 4, 4)) for o in range(64)
    ]
    noise, added = (
        torch.from_numpy(
            np.stack([pair[0] if pair[which] is None else pair[which] for pair in drawn])
        )
        for which in (0, 1)
    )
    losses = objective(
        lambda x, timestep: 3 * (x + timestep[:, None, None, None] / 1000).sin(),
        x0,
        noise,
        u,
        added,
    )
    denoise = drawing.guidance(
        {CONDITIONED: lambda x, t: x.sin() * 6, UNCONDITIONED: lambda x, t: x.cos()},
        drawing.guidance_scale,
        objective.schedule,
    )
    picture = drawing.sampler(
        denoise,
        x,
        drawing.grid(drawing.steps, objective.schedule),
        objective.schedule,
        lambda step: x0.roll(step, 0),
    )
    strata = [
        float(build(cfg["times"], "times").stratified)
    ]  # read where batches are made, see test_draws.py
    return [*losses.per_sample.tolist(), *losses.t.tolist(), *picture.flatten().tolist(), *strata]


@pytest.mark.parametrize("option", OF_THE_MATHEMATICS)
def test_every_key_of_the_mathematics_has_an_effect(option, composed):
    group, _, name = option.partition("/")
    wide = (
        ["schedule=geometric", "schedule.sigma_min=0.0001", "schedule.sigma_max=1000"]
        if group == "grid"
        else []
    )  # bounds lie within it
    cfg = composed(
        *choice(option, None), *wide, *([] if group == "weighting" else ["weighting=simple"])
    )
    node = cfg[group][name] if group == "modifiers" else cfg[group]
    straight, dead = fingerprint(cfg), []
    assert fingerprint(cfg) == straight  # the twin: with nothing changed nothing changes
    for key, value in node.items():
        if key.startswith("_") or option == "schedule/table":  # a table's keys: see tests/schedules
            continue
        if isinstance(value, bool):
            other = not value
        elif isinstance(value, int):
            other = value // 2
        elif isinstance(value, float):
            other = value * 0.5 if value else 0.1
        else:
            other = {"log_snr_min": -1.0, "log_snr_max": 1.0}[key]
        if (
            fingerprint(
                copy.deepcopy(cfg)
                | {
                    group: cfg[group]
                    | ({name: node | {key: other}} if group == "modifiers" else {key: other})
                }
            )
            == straight
        ):
            dead.append(key)
    assert dead == (
        []
        if group != "times"
        else [key for key in dead if key == "continuous" and not build_schedule(cfg).discrete]
    )


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["trainer.max_skipped=-1"], "trainer.max_skipped"),
        (["trainer.precision=16-mixed"], "trainer.max_skipped"),
        (["trainer.threads=0"], "trainer.threads"),
    ],
)
def test_a_trainer_that_cannot_be_is_refused(composed, words, key):
    with pytest.raises(UserError, match=key):
        build(composed(*words)["trainer"], "trainer")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["guidance_scale=nan"], "guidance_scale"),
        (["grid=karras", "grid.rho=1e17"], "steps=.*grid"),
        (["steps=1001"], "steps=1001"),
        (["guidance.max_std=0"], "guidance.max_std"),
        (["guidance.log_snr_min=3", "guidance.log_snr_max=1"], "guidance.log_snr_min"),
    ],
)
def test_a_drawing_that_cannot_be_is_refused_before_training(composed, words, said):
    cfg = composed(*words)
    with pytest.raises(UserError, match=said):
        build_drawing(cfg, build_schedule(cfg))


def test_sampling_batch_size_changes_how_many_are_drawn_at_once(composed):
    from sdtrain.schedules.linear import linear

    for config in ("sample", "evaluate"):
        cfg = composed("checkpoint=x", "batch_size=3", "guidance_scale=2", config=config)
        assert build_drawing(cfg, linear()).batch_size == 3
