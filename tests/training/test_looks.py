"""Looks at the model: the weights are safe before them, a signal ends them at once, those that are
missing are made later, and they cost no more than their share."""

import itertools
import os
import re
import signal
from types import SimpleNamespace

import pytest
import torch
from reading import lines, newest, numbers, same, status, with_values

from sdtrain.assemble.drawing import build_drawing
from sdtrain.assemble.model import build_data
from sdtrain.assemble.objective import build_objective
from sdtrain.config.precheck import precheck_config
from sdtrain.errors import UserError
from sdtrain.generation.count_evaluations import count_evaluations
from sdtrain.models.multiplications import multiplications
from sdtrain.models.unet import UNet
from sdtrain.runs.manifest import find_damage
from sdtrain.schedules.linear import linear
from sdtrain.training.callbacks import budget
from sdtrain.training.callbacks.assembly import build_callbacks
from sdtrain.training.callbacks.budget import Costs
from sdtrain.training.callbacks.looks import Looks
from sdtrain.training.diffusion_module import DiffusionModule
from sdtrain.training.parts import build_parts
from sdtrain.training.plan import make_plan
from sdtrain.training.progress import Progress
from sdtrain.training.stopping import Stopping

AT_THE_END = [
    "trainer.max_images=16",
    "trainer.log_every=8",
    "callbacks.samples.every=1000000",
    "callbacks.samples.guidance_scales=[1,2]",
    "callbacks.noise_levels.every=1000000",
    "callbacks.noise_levels.num_images=2",
    "validation.every=1000000",
    "checkpoint.keep=8",
]
OFTEN = [
    *AT_THE_END,
    "trainer.max_images=24",
    "callbacks.samples.every=8",
    "validation.every=8",
    "checkpoint.every=16",
]
"""Where there are looks at 8, 16 and 24, and a checkpoint before the end at 16 alone."""


def pictures_of(run) -> dict[str, bytes]:
    """What its looks have left in files."""
    found = {}
    for path in sorted(run.rglob("*")):
        if path.parent.name in ("samples", "validation"):
            found[f"{path.parent.name}/{path.name}"] = path.read_bytes()
    return found


def signal_at(call: int, number: int = signal.SIGTERM, rank: int = 0) -> list[int]:
    """The signal comes at that network evaluation of a look. Returns a list of those that begin."""
    go_on = Stopping.check_interrupted
    begun = []
    calls = itertools.count(1)

    def signalled(self):
        if next(calls) == call and int(os.environ.get("LOCAL_RANK", 0)) == rank:
            os.kill(os.getpid(), number)
        go_on(self)
        begun.append(call)

    Stopping.check_interrupted = signalled
    return begun


def wait_for_signal_on_rank_1() -> None:
    """Rank 1, which waits while rank 0 looks, gets the signal as it begins to."""
    wait_for_ranks = Stopping.wait_for_ranks

    def signalled(self):
        if int(os.environ.get("LOCAL_RANK", 0)):
            os.kill(os.getpid(), signal.SIGTERM)
        wait_for_ranks(self)

    Stopping.wait_for_ranks = signalled


@pytest.fixture
def unpatched(monkeypatch):
    monkeypatch.setattr(Stopping, "check_interrupted", Stopping.check_interrupted)
    return monkeypatch


@pytest.fixture(scope="module")
def whole(train_tiny, tmp_path_factory):
    """A run to which nothing happens."""
    run = tmp_path_factory.mktemp("whole") / "run"
    result = train_tiny(run, *AT_THE_END)
    assert result.code == 0, result.err
    return run


def assert_stopped(run, result, code: int, seen: int) -> None:
    assert result.code == code, result.err
    left = status(run)
    assert (left["state"], left["exit_code"], left["images_seen"]) == ("interrupted", code, seen)
    assert newest(run).name == f"{seen:012d}" and find_damage(newest(run)) is None


def assert_same_run(run, whole, saved) -> None:
    assert status(run)["state"] == "finished"
    assert same(saved(run), saved(whole))
    assert numbers(run) == numbers(whole) and pictures_of(run) == pictures_of(whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "number", "code"),
    [(16, signal.SIGTERM, 143), (1, signal.SIGINT, 130), (5, signal.SIGTERM, 143)],
)
def test_a_signal_ends_the_last_look_and_it_is_made_later(
    train_tiny, found_by, whole, saved, unpatched, tmp_path, call, number, code
):
    run = tmp_path / "runs" / "shapes" / "run"
    begun = signal_at(call, number)
    result = train_tiny(run, *AT_THE_END)
    assert_stopped(run, result, code, 16)
    assert len(begun) == call - 1 and "after the last step" in result.out
    assert same(saved(run), saved(whole))
    unpatched.undo()
    unpatched.chdir(tmp_path)
    assert found_by(*AT_THE_END) == run
    steps = []
    unpatched.setattr(DiffusionModule, "training_step", lambda *given: steps.append(given))
    result = train_tiny(run, *AT_THE_END, "resume=auto")
    assert result.code == 0 and not steps, result.err
    assert_same_run(run, whole, saved)


@pytest.mark.slow
def test_a_signal_in_mid_run_saves_and_the_look_is_made_later(
    train_tiny, saved, unpatched, tmp_path
):
    """Where there is no checkpoint of its own (8), and where there is one (16, 24)."""
    whole = tmp_path / "whole"
    assert train_tiny(whole, *OFTEN).code == 0
    go_on = Stopping.check_interrupted
    for place, (call, seen) in enumerate([(3, 8), (11, 16), (20, 24)]):
        run = tmp_path / str(place)
        signal_at(call)
        assert_stopped(run, train_tiny(run, *OFTEN), 143, seen)
        unpatched.setattr(Stopping, "check_interrupted", go_on)
        result = train_tiny(run, *OFTEN, "resume=must")
        assert result.code == 0, result.err
        assert_same_run(run, whole, saved)


@pytest.mark.slow
def test_killed_in_the_last_look_the_last_step_is_there(
    command, train_tiny, tiny, whole, saved, tmp_path
):
    run = tmp_path / "run"
    before = f"{__file__}:signal_at(16, signal.SIGKILL)"
    result = command("sdtrain", *tiny(*AT_THE_END), f"hydra.run.dir={run}", before=before)
    assert result.code == -signal.SIGKILL and status(run)["state"] == "running"
    assert newest(run).name == f"{16:012d}" and same(saved(run), saved(whole))
    result = train_tiny(run, *AT_THE_END, "resume=must")
    assert result.code == 0, result.err
    assert_same_run(run, whole, saved)


@pytest.mark.slow
def test_a_signal_to_a_rank_that_waits_ends_the_look_of_another(command, tiny, saved, tmp_path):
    ranks = ["strategy=ddp", "trainer.devices=2"]
    words = tiny(*AT_THE_END, *ranks)
    whole = tmp_path / "whole"
    assert command("sdtrain", *words, f"hydra.run.dir={whole}").code == 0
    for name in ("wait_for_signal_on_rank_1()", "signal_at(3, rank=1)"):  # in noise_levels
        run = tmp_path / name[:6]
        before = f"{__file__}:{name}"
        result = command("sdtrain", *words, f"hydra.run.dir={run}", before=before)
        assert_stopped(run, result, 143, 16)
    result = command("sdtrain", *words, "resume=must", f"hydra.run.dir={run}")
    assert result.code == 0, result.err
    assert_same_run(run, whole, saved)


@pytest.mark.slow
def test_a_run_whose_time_was_up_only_looks(train_tiny, unpatched, tmp_path):
    """And one that may take longer than that goes on."""
    run = tmp_path / "run"
    timed = ["trainer.max_minutes=0.001", "trainer.max_images=640", "lr_schedule=constant"]
    signal_at(1)
    result = train_tiny(run, *AT_THE_END, *timed)
    seen = status(run)["images_seen"]
    assert_stopped(run, result, 143, seen)
    unpatched.undo()
    result = train_tiny(run, *AT_THE_END, *timed, "resume=must")
    assert result.code == 0 and status(run)["images_seen"] == seen, result.err
    assert "validation/loss" in set().union(*lines(run))
    longer = [*timed, "trainer.max_minutes=1", f"trainer.max_images={seen + 8}", "resume=must"]
    result = train_tiny(run, *AT_THE_END, *longer)
    assert result.code == 0 and status(run)["images_seen"] == seen + 8, result.err


# Their budget


def test_the_network_is_asked_no_more_than_the_share_allows(train_tiny, monkeypatch, tmp_path):
    """Counted where the network is asked: with 80 % of 96 evaluations, less than all that is
    wanted."""
    monkeypatch.setattr(budget, "PAGE", 1e6)
    asked = []

    def count(module, given, output):
        if isinstance(module, UNet) and not torch.is_grad_enabled():
            asked.append(len(given[0]))

    run = tmp_path / "run"
    words = [
        "looks.share=0.8",
        "trainer.max_images=32",
        "callbacks.samples.every=16",
        "validation.every=16",
        "callbacks.noise_levels.num_images=16",
        "model/autoencoder=pixels",
        "data.image_size=16",
    ]
    hook = torch.nn.modules.module.register_module_forward_hook(count)
    try:
        result = train_tiny(run, *OFTEN, *words)
    finally:
        hook.remove()
    assert result.code == 0, result.err
    told = [line["looks/share"] for line in lines(run) if "looks/share" in line]
    assert 0 < max(told) <= 0.8 and told[-1] > 0.2
    assert 0 < sum(asked) / 96 <= told[-1] * 1.05 + 3 / 96
    assert "looks.share" in result.out and re.search("noise_levels: .* of 16 pictures", result.out)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["steps=5"], 10),
        (["steps=5", "guidance_scale=1"], 5),
        (["steps=5", "sampler=dpmpp_2m", "guidance_scale=1"], 5),
        (["steps=5", "guidance.log_snr_min=-5"], 8),  # the first two lie below it
    ],
)
def test_evaluations_of_a_picture(composed, words, wanted):
    drawing = build_drawing(composed(*words), linear())
    assert count_evaluations(drawing, linear(), (4, 4, 4)) == wanted


def test_evaluations_of_a_sampler_of_two_slopes(composed):
    words = ["steps=50", "sampler=heun", "guidance_scale=1"]
    found = count_evaluations(build_drawing(composed(*words), linear()), linear(), (4, 4, 4))
    assert 50 < found <= 99


def test_multiplications_of_layers():
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 2, 1, stride=2)
    )
    x = torch.zeros(2, 3, 4, 6)
    wanted = 2 * (3 * 8 * 9 * 24 + 8 * 2 * 6)
    assert multiplications(net, lambda: net(x)) == wanted
    linear_layer = torch.nn.Linear(5, 7)
    assert multiplications(linear_layer, lambda: linear_layer(torch.zeros(2, 3, 5))) == 6 * 35


@pytest.fixture(scope="module")
def default(composed, tmp_path_factory):
    """plan(images, every, share) -> [what each look plans] at each place of a default run."""
    folder = tmp_path_factory.mktemp("default")

    def planned(max_images: int, every: int, share: float | None) -> list[dict]:
        words = [
            "trainer.accelerator=cpu",
            "logger=none",
            "data.size=40",
            "data.validation_size=256",
            f"looks.share={'null' if share is None else share}",
            *(f"{key}.every={every}" for key in LOOKING),
        ]
        plan = make_plan(precheck_config(composed(*words), words))
        progress = Progress(32, max_images)
        parts = build_parts(plan, build_data(plan.config["data"]), folder, progress)
        found = build_callbacks(
            plan.config,
            plan.prechecked.trainer,
            run_dir=folder,
            data=parts.data,
            drawing=plan.drawing,
        )
        parts.module.progress = progress
        given = dict.fromkeys(("stopping", "checkpoints", "metrics_log", "console"))
        looks = Looks(looks=found.looks, share=share, precision="32-true", **given)
        looks.costs = Costs(encode=0.5, decode=1.5, page=20.0, ranks=1)
        looks.stopping = SimpleNamespace(check_interrupted=lambda: None)
        looks.console = SimpleNamespace(print=lambda *given, **named: None)
        moments = []
        looks._run_look = lambda trainer, module, name, planned, spent: moments[-1].update(
            {name: planned, "spent": spent}
        )
        for seen in range(every, max_images + 1, every):
            progress.images_seen = seen
            moments.append({"seen": seen, "spent": looks.budget.spent})
            looks._run_due(SimpleNamespace(world_size=1), parts.module, set())
        return moments

    return planned


LOOKING = ("callbacks.samples", "callbacks.noise_levels", "validation")


@pytest.mark.slow
def test_the_default_run_looks_well_for_its_share(default):
    moments = default(64000, 16000, 0.05)
    for moment in moments:
        assert moment["spent"] <= 0.05 * 3 * moment["seen"]
    *middle, last = moments
    assert last["samples"].pictures == 16 and last["samples"].guided >= 4
    assert last["validation"].count == 256 and last["noise_levels"].count >= 64
    for moment in middle:
        assert moment["samples"].pictures >= 4 and moment["noise_levels"].count >= 8
    for max_images, every in ((64000, 1000), (6400, 1600), (320, 320), (32, 32)):
        for moment in default(max_images, every, 0.05):
            assert moment["spent"] <= 0.05 * 3 * moment["seen"]
    everything = default(64000, 64000, None)[-1]
    assert everything["noise_levels"].weights == ("ema", "raw")
    assert (everything["noise_levels"].count, everything["samples"].guided) == (256, 8)


def test_what_is_left_out_counts_against_the_pictures_that_there_are(composed, tmp_path):
    words = [
        "data.validation_size=7",
        "callbacks.noise_levels.num_images=50",
        "validation.num_images=50",
        "trainer.accelerator=cpu",
    ]
    plan = make_plan(precheck_config(composed(*words), words))
    found = build_callbacks(
        plan.config,
        plan.prechecked.trainer,
        run_dir=tmp_path,
        data=build_data(plan.config["data"]),
        drawing=plan.drawing,
    )
    costs = Costs(encode=0.0, decode=0.0, page=0.0, ranks=1)
    objective = build_objective(plan.config)
    module = SimpleNamespace(model=SimpleNamespace(objective=objective))
    everything = {"first": False, "last": True}
    for look in (found.validation, found.named["noise_levels"]):
        planned = look.plan(module, costs, 1e9, **everything)
        assert (planned.count, planned.left_out) == (7, [])
    reduced = found.validation.plan(module, costs, 3.0, **everything)
    assert (reduced.count, len(reduced.left_out)) == (3, 1)
    assert "3 of 7" in reduced.left_out[0]


def test_bad_shares(composed):
    for value in ("0", "1.5", "-1", ".nan", "many"):
        with pytest.raises(UserError) as caught:
            precheck_config(with_values(composed(), f"looks.share={value}"), [])
        assert caught.value.key == "looks.share" and caught.value.exit_code == 2, value


def test_a_share_of_noise_levels_is_of_an_earlier_version(composed, tiny, capsys):
    """In a yaml it is told, on the command line it is refused."""
    cfg = composed(*tiny())
    cfg["callbacks"]["noise_levels"]["share"] = 0.02
    prechecked = precheck_config(cfg, [])
    assert "callbacks.noise_levels.share" in capsys.readouterr().err
    assert "share" not in prechecked.config["callbacks"]["noise_levels"]
    del cfg["looks"]
    assert precheck_config(cfg, []).looks.share == 0.05
