"""Every file under configs/ composes, and what it offers is built and runs. A new file is picked up
by itself. That every key has an effect, see test_effects.py."""

import pytest
import yaml
from hydra import compose, initialize_config_dir
from PIL import Image
from reading import newest, status, with_values
from stable_diffusion import save_pipeline
from stored_pictures import rows, write_parquet

from sdtrain.assemble.drawing import build_drawing
from sdtrain.assemble.objective import build_schedule
from sdtrain.config.build import build
from sdtrain.config.check import Checker, import_target
from sdtrain.config.precheck import DIFFUSION_ONLY
from sdtrain.config.trusted import iterate_targets
from sdtrain.data.emoji import find_fonts
from sdtrain.errors import UserError
from sdtrain.paths import config_dir

FILES = sorted(
    path.relative_to(config_dir()).with_suffix("").as_posix()
    for path in config_dir().rglob("*.yaml")
)
FOR_AN_AUTOENCODER = [
    "model/autoencoder",
    "callbacks/autoencoder",
    *(f"{group}/none" for group in DIFFUSION_ONLY),
]
OF_EVALUATE = [file for file in FILES if file.startswith("metric/")]
NOT_OF_THE_DEFAULT_RUN = (*FOR_AN_AUTOENCODER, *OF_EVALUATE)
OPTIONS = [file for file in FILES if "/" in file and file not in NOT_OF_THE_DEFAULT_RUN]
SMALL_UNET = ["model.unet.architecture={pipeline}/unet", "data.image_size=32"]
SMALL_TEXT = ["model.conditioner.architecture={pipeline}/text_encoder"]
SMALL_TEXT.append("model.conditioner.tokenizer={pipeline}/tokenizer")
PIPELINE = ["model=stable_diffusion", "model.pretrained={pipeline}", "data.image_size=32"]
BESIDE = {  # what an option wants beside it
    "data/emoji": ["model/autoencoder=pixels", "data.image_size=16"],
    "data/images": ["model/autoencoder=pixels", "data.image_size=16", "data.path={pictures}"],
    "data/dataset": ["model/autoencoder=pixels", "data.image_size=16", "data.path={parquet}"],
    "model/autoencoder/pixels": ["data.image_size=16"],
    "model/stable_diffusion": ["model.pretrained={pipeline}", "data.image_size=32"],
    "adapter/textual_inversion": [
        *PIPELINE,
        "adapter.word=gem",
        "adapter.initial=red",
        "data=images",
        "data.path={pictures}",
        "data.caption_template=gem",
    ],
    "adapter/lora": PIPELINE,
    "model/sd15": [*SMALL_UNET, *SMALL_TEXT],
    "model/sd21": [*SMALL_UNET, *SMALL_TEXT],
    "model/small": [*SMALL_UNET, *SMALL_TEXT],
    "model/autoencoder/folder": ["model.autoencoder.path=data/shapes_autoencoder"],
    "experiment/images_autoencoder": ["data.path={pictures}"],
    "experiment/dataset_autoencoder": ["data.path={parquet}", "data.image_size=16"],
    "schedule/table": ["schedule.betas=[0.001,0.01,0.1,0.2,0.3,0.5]", "schedule.num_timesteps=6"],
    "experiment/pixels": ["model.unet.attention=[true,true]"],
    "guidance/two_conditions": ["model/channels=[depth]"],
    "schedule/flow": ["prediction=v"],
    "modifiers/zero_terminal_snr": ["prediction=v"],
    "modifiers/clip": ["modifiers.clip.log_snr_max=4", "modifiers.clip.log_snr_min=-4"],
}
EXTRAS = {  # packages that not every environment has
    "optimizer/adamw_8bit": "bitsandbytes",
    "optimizer/schedule_free": "schedulefree",
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
OF_THE_MATHEMATICS = [
    option for option in OPTIONS if option.partition("/")[0] in (*DIFFUSION_ONLY, "modifiers")
]
SEEN = [*DEFAULT, *LONG, *ELSEWHERE, *OF_THE_MATHEMATICS]
OTHERS = [option for option in OPTIONS if option not in SEEN]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of 40 small pictures with captions."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(40):
        Image.new("RGB", (40, 36), (6 * i, 255 - 6 * i, 100)).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"colour number {i}")
    return folder


@pytest.fixture(scope="module")
def folders(pictures, tmp_path_factory):
    """{what BESIDE names: the folder}."""
    pipeline = save_pipeline(tmp_path_factory.mktemp("pretrained") / "pipeline")
    parquet = write_parquet(tmp_path_factory.mktemp("stored") / "parquet", rows(40))
    return {"pictures": pictures, "pipeline": pipeline, "parquet": parquet}


def choice(option: str, folders) -> list[str]:
    group, _, name = option.rpartition("/")
    return [
        f"{group}=[{name}]" if group == "modifiers" else f"{group}={name}",
        *(word.format(**folders) for word in BESIDE.get(option, [])),
    ]


def test_the_walk_finds_them():
    assert {
        "train",
        "sample",
        "evaluate",
        "data/shapes",
        "model/unet/small",
        "schedule/none",
        "experiment/emoji",
    } <= set(FILES)


@pytest.mark.parametrize("file", FILES)
def test_every_target_exists(file):
    text = (config_dir() / f"{file}.yaml").read_text()
    for target in iterate_targets(yaml.safe_load(text)):
        assert target.startswith(("sdtrain.", "torch."))
        import_target({"_target_": target}, file)


def one_of_each_group(options: list[str]) -> list[list[str]]:
    """Every option once, in as few lists as there are options in the largest group."""
    rows = []
    for option in options:
        group = option.rpartition("/")[0]
        for row in rows:
            if all(other.rpartition("/")[0] != group for other in row):
                row.append(option)
                break
        else:
            rows.append([option])
    return rows


@pytest.mark.parametrize("options", one_of_each_group([*LONG, *ELSEWHERE]), ids=" ".join)
def test_the_options_that_run_elsewhere_pass_the_check(options, planned, folders):
    words = []
    for option in options:
        words += choice(option, folders)
    assert planned(*words).notes == ()


SIXTEEN = ["trainer.max_images=16", "checkpoint.every=1000"]


def assert_finished(result, folder) -> None:
    assert result.code == 0, result.err
    assert status(folder)["state"] == "finished"
    assert newest(folder).name == f"{16:012d}"


@pytest.mark.slow
@pytest.mark.parametrize("option", OF_THE_MATHEMATICS)
def test_every_option_of_the_mathematics_passes_the_check(option, planned, tiny_config, folders):
    """What it computes: tests/config/test_effects.py. Some of them run together, below."""
    assert planned(config=tiny_config(*choice(option, folders))).config


@pytest.mark.slow
@pytest.mark.parametrize("option", OTHERS)
def test_every_other_option_runs_two_steps(option, composed, tiny, train_config, folders, tmp_path):
    if option in EXTRAS:
        pytest.importorskip(EXTRAS[option])
    words = tiny(*choice(option, folders), *SIXTEEN)
    assert_finished(train_config(tmp_path / "run", composed(*words), words), tmp_path / "run")


TOGETHER = [  # one option of each group of the mathematics, none of them the default
    "schedule=cosine",
    "modifiers=[shift]",
    "prediction=v",
    "weighting=min_snr",
    "loss=huber",
    "times=logit_normal",
    "noise=multi_resolution",
    "sampler=dpmpp_2m_sde",
    "grid=karras",
    "guidance_scale=2",
]


@pytest.mark.slow
def test_options_of_all_groups_run_two_steps_together(train_tiny, tmp_path):
    assert_finished(train_tiny(tmp_path / "run", *TOGETHER, *SIXTEEN), tmp_path / "run")


def test_the_default_options_are_found():
    """That they run is seen in tests/training/test_runs.py."""
    assert {
        "data/shapes",
        "model/unet/small",
        "schedule/scaled_linear",
        "logger/wandb",
        "model/latent_diffusion",
    } <= set(DEFAULT)


@pytest.mark.parametrize("option", ["model/autoencoder", "callbacks/autoencoder"])
def test_what_is_for_an_autoencoder_is_refused_for_a_diffusion_model(option, refused):
    group, _, name = option.rpartition("/")
    error = refused(f"{group}={name}")
    assert error.exit_code == 2
    assert error.key.partition(".")[0] in (group, *DIFFUSION_ONLY)


def test_a_diffusion_model_without_a_group_that_it_needs_is_refused(refused, composed):
    without = composed(*(f"{group}=none" for group in DIFFUSION_ONLY))
    for group in DIFFUSION_ONLY:
        config = composed() | {group: without[group]}
        error = refused(f"{group}=none", config=config)
        assert error.exit_code == 2, group
        assert error.key == group


installed = pytest.mark.skipif(not find_fonts(), reason="no colour emoji font")


@pytest.mark.slow
@installed
@pytest.mark.parametrize("option", sorted({*LONG} - {"experiment/emoji"}))
def test_emoji(option, train_tiny, monkeypatch, tmp_path):
    """Of a few hundred code points."""
    monkeypatch.setattr("sdtrain.data.emoji.code_points", lambda: range(0x1F300, 0x1F400))
    run = tmp_path / "run"
    assert_finished(train_tiny(run, *choice(option, {}), *SIXTEEN), run)
    if option != "data/emoji":
        assert (run / "autoencoder/config.json").is_file()


@pytest.mark.slow
@installed
def test_emoji_in_both_stages(command, tiny, tmp_path):
    run = tmp_path / "run"
    words = tiny("experiment=emoji", "first_stage.max_images=16", *SIXTEEN)
    assert_finished(command("sdtrain", *words, f"hydra.run.dir={run}"), run)
    assert (run / "first_stage/autoencoder/config.json").is_file()


@pytest.mark.parametrize("config", ["sample", "evaluate"])
def test_the_other_commands_compose(config, composed):
    cfg = composed("checkpoint=x", config=config)
    for name in ("sampler", "grid", "guidance"):
        Checker(()).node(cfg[name], name)


def test_samples_and_evaluations_take_every_sampler(composed):
    """Those that set more than themselves, and one of the others."""
    samplers = sorted((config_dir() / "sampler").glob("*.yaml"))
    wide = [path.stem for path in samplers if "@package" in path.read_text()]
    assert wide
    for place, sampler in enumerate(["heun", *wide]):
        composed("checkpoint=x", f"sampler={sampler}", config=("sample", "evaluate")[place % 2])


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
        build(with_values(composed(), *words)["trainer"], "trainer")


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
    options = [word for word in words if word.startswith("grid=")]
    cfg = with_values(composed(*options), *words[len(options) :])
    with pytest.raises(UserError, match=said):
        build_drawing(cfg, build_schedule(cfg))


def test_sampling_batch_size_changes_how_many_are_drawn_at_once(composed):
    from sdtrain.schedules.linear import linear

    for config in ("sample", "evaluate"):
        cfg = composed("checkpoint=x", "batch_size=3", "guidance_scale=2", config=config)
        assert build_drawing(cfg, linear()).batch_size == 3
