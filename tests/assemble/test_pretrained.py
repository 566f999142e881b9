"""A model with the weights of a Stable Diffusion pipeline computes what the pipeline computes, and
trains what model.train names.
"""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from omegaconf import OmegaConf
from reading import BARE, newest, same, tensors, with_values
from safetensors.torch import load_file, save_file
from stable_diffusion import SCHEDULER, fill_hub_cache, save_pipeline

from sdtrain.assemble.objective import build_schedule
from sdtrain.conditioning.clip import Clip
from sdtrain.conditioning.interface import Inputs
from sdtrain.config.compose import compose_config, resolve_config
from sdtrain.config.overrides import prepare_arguments
from sdtrain.config.pretrained import prediction_node, replaced_lines, schedule_node
from sdtrain.diffusion.prediction import Flow
from sdtrain.errors import UserError
from sdtrain.export.scheduler import scheduler_of
from sdtrain.models.pipeline_folder import read_pipeline_folder
from sdtrain.models.stable_diffusion_unet import add_input_channels
from sdtrain.schedules.flow import flow

PROMPTS = ["a large red star on a blue background", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("pretrained") / "pipeline")


@pytest.fixture(scope="module")
def pipeline(folder):
    return StableDiffusionPipeline.from_pretrained(
        folder, low_cpu_mem_usage=False, safety_checker=None, requires_safety_checker=False
    )


@pytest.fixture(scope="module")
def chosen(folder):
    return ["model=stable_diffusion", f"model.pretrained={folder}", "data.image_size=32"]


@pytest.fixture(scope="module")
def config(tiny_config, chosen):
    """The configuration of a short fine-tuning of this pipeline. On few pictures, as the scale of
    the latents is measured on all of them."""
    return tiny_config(*chosen, "data.size=8")


@pytest.fixture(scope="module")
def composed_config(tiny, composed, chosen):
    """composed_config("model.train=[unet]", ...) -> the same of keys that Hydra refers to
    elsewhere."""
    return lambda *words: composed(*tiny(*chosen, "data.size=8", *words))


@pytest.fixture(scope="module")
def build_model(planned, built):
    """build_model(CONFIGURATION) -> its model."""
    return lambda config: built(planned(config=config)).module.model


@pytest.fixture(scope="module")
def model(build_model, config):
    """Not to be changed: several tests read it."""
    return build_model(config)


def inputs(prompts: list[str]) -> Inputs:
    count = len(prompts)
    labels = torch.zeros(count, dtype=torch.long)
    return Inputs(prompts, labels, labels.bool(), latent_size=(8, 8))


def test_context_noise_and_latents_are_those_of_the_pipeline(pipeline, model):
    assert torch.equal(
        model.conditioner(inputs(PROMPTS)).context,
        pipeline.encode_prompt(PROMPTS, "cpu", 1, False)[0],
    )
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    timestep = torch.tensor([3.0, 900.0])
    context = model.conditioner(inputs(PROMPTS)).context
    with torch.no_grad():
        expected = pipeline.unet(x, timestep, context).sample
        assert torch.equal(model.unet(x, timestep, context), expected)
        image = torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1
        encoded = pipeline.vae.encode(image).latent_dist.mean * pipeline.vae.config.scaling_factor
        assert torch.equal(model.latents(image), encoded)


def test_clip_skip_leaves_out_the_last_layers(pipeline, build_model, config):
    """As a text encoder would that had never had them."""
    conditioner = build_model(with_values(config, "model.conditioner.clip_skip=1")).conditioner
    shorter = copy.deepcopy(pipeline.text_encoder)
    del shorter.encoder.layers[-1]
    tokens = pipeline.tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    context = conditioner(inputs(PROMPTS)).context
    assert torch.equal(context, shorter(tokens).last_hidden_state)
    assert not torch.equal(context, pipeline.text_encoder(tokens).last_hidden_state)


@pytest.mark.parametrize("clip_skip", [-1, 3])
def test_clip_skip_leaves_a_layer(refused, config, clip_skip):
    error = refused(config=with_values(config, f"model.conditioner.clip_skip={clip_skip}"))
    assert error.key == "model.conditioner.clip_skip"


SCHEDULERS = {
    "Stable Diffusion": SCHEDULER,
    "linear": {"beta_schedule": "linear", "prediction_type": "v_prediction"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"},
    "table": {"trained_betas": [0.001, 0.01, 0.1, 0.2], "num_train_timesteps": 4},
    "zero terminal SNR": {
        **SCHEDULER,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
    },
}


@pytest.fixture(scope="module")
def filled(config):
    """filled("model.pretrained=FOLDER", ...) -> the configuration with these values, in which what
    was filled in from the folder is filled in once more."""

    def again(*words: str) -> dict:
        empty = ["schedule=null", "prediction=null", "data.image_size=null"]
        return resolve_config(OmegaConf.create(with_values(config, *empty, *words)), [])

    return again


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_schedule_is_that_of_the_folder(name, folder, tmp_path, planned, filled):
    copied = Path(shutil.copytree(folder, tmp_path / "pipeline"))
    scheduler = DDIMScheduler(**SCHEDULERS[name])
    scheduler.save_pretrained(copied / "scheduler")
    config = planned(config=filled(f"model.pretrained={copied}")).config
    schedule = build_schedule(config)
    t = torch.linspace(0, 1, len(scheduler.alphas_cumprod), dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(t)
    expected = scheduler.alphas_cumprod.double()
    # diffusers multiplies a thousand factors in float32.
    assert torch.allclose(alpha.double().flatten() ** 2, expected, rtol=1e-4, atol=1e-8)
    assert torch.allclose(sigma.double().flatten() ** 2, 1 - expected, rtol=0, atol=1e-6)
    predictions = {"epsilon": "Epsilon", "v_prediction": "V", "sample": "X0"}
    wanted = predictions[scheduler.config.prediction_type]
    assert config["prediction"]["_target_"].endswith(f".{wanted}")


@pytest.mark.parametrize(
    ("file", "key", "value", "node_of"),
    [
        ("scheduler_config.json", "beta_schedule", "sigmoid", schedule_node),
        ("scheduler_config.json", "prediction_type", "flow_prediction", prediction_node),
        ("scheduler_config.json", "_class_name", "FlowMatchEulerDiscreteScheduler", schedule_node),
        ("scheduler_config.json", "beta_start", None, schedule_node),
        ("scheduler_config.json", "trained_betas", 5, schedule_node),
        ("scheduler_config.json", "num_train_timesteps", "many", schedule_node),
    ],
)
def test_a_scheduler_without_counterpart_is_refused(folder, file, key, value, node_of):
    pipeline = read_pipeline_folder(folder, "SOURCE", None)
    pipeline.scheduler[key] = value
    with pytest.raises(UserError, match=f"{key}='?{value}") as caught:
        node_of(pipeline, "SOURCE")
    assert caught.value.key == "model.pretrained"


def test_a_tokenizer_of_another_text_encoder_is_refused(folder, tmp_path):
    copied = Path(shutil.copytree(folder, tmp_path / "pipeline"))
    file = copied / "text_encoder/config.json"
    file.write_text(file.read_text().replace('"vocab_size": 1756', '"vocab_size": 100'))
    with pytest.raises(UserError, match="vocab_size=100") as caught:
        Clip(architecture=f"{copied}/text_encoder", tokenizer=f"{copied}/tokenizer")
    assert caught.value.key == "model.conditioner.tokenizer"


def test_a_flow_that_was_exported_is_read_as_flow(folder):
    pipeline = read_pipeline_folder(folder, "SOURCE", None)
    pipeline.scheduler.clear()
    pipeline.scheduler.update(scheduler_of(flow(num_timesteps=500), Flow()).config)
    schedule = schedule_node(pipeline, "SOURCE")
    assert schedule == {"_target_": "sdtrain.schedules.flow.flow", "num_timesteps": 500}
    assert prediction_node(pipeline, "SOURCE")["_target_"].endswith(".Flow")
    pipeline.scheduler["flow_shift"] = 3.0
    with pytest.raises(UserError, match="flow_shift=3"):
        schedule_node(pipeline, "SOURCE")


@pytest.mark.parametrize(
    ("words", "modifiers", "replaced"),
    [
        ([], ["zero_terminal_snr"], []),
        (
            ["modifiers=[shift]"],
            ["zero_terminal_snr", "shift"],
            ["schedule=linear+zero_terminal_snr+shift replaces linear+zero_terminal_snr"],
        ),
        (["schedule=linear"], [], ["schedule=linear replaces linear+zero_terminal_snr"]),
        (["prediction=epsilon"], ["zero_terminal_snr"], ["prediction=Epsilon replaces V"]),
    ],
)
def test_what_replaces_a_zero_terminal_schedule_is_told(
    folder, tmp_path, words, modifiers, replaced
):
    copied = Path(shutil.copytree(folder, tmp_path / "pipeline"))
    linear = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
    zero = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    file = copied / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | linear | zero))
    config = compose_config(
        "train", ["model=stable_diffusion", f"model.pretrained={copied}", *words]
    )
    assert list(config.get("modifiers") or {}) == modifiers
    lines = replaced_lines(config)
    assert len(lines) == len(replaced)
    assert all(line.startswith(begin) for line, begin in zip(lines, replaced, strict=True))


@pytest.mark.parametrize("size", [36, 33])
def test_sizes_that_no_pipeline_draws_are_refused(folder, size):
    words = ["model=stable_diffusion", f"model.pretrained={folder}", f"data.image_size={size}"]
    with pytest.raises(UserError) as caught:
        compose_config("train", words)
    assert caught.value.key == "data.image_size"


def test_the_pipeline_is_recorded_by_its_absolute_path(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    config = compose_config("train", ["model=stable_diffusion", f"model.pretrained={folder.name}"])
    assert config["model"]["pretrained"] == str(folder)


def test_a_schedule_that_replaces_the_folders_is_told_and_recorded(planned, composed_config):
    plan = planned(config=composed_config("schedule=cosine"))
    assert plan.config["schedule"]["_target_"].endswith(".cosine")
    assert any("schedule=cosine replaces scaled_linear" in note for note in plan.notes)


def test_settings_of_stable_diffusion(planned, config):
    plan = planned(config=config)
    assert not any("replaces" in note for note in plan.notes)
    assert plan.config["guidance"]["max_std"] is None
    assert plan.config["weighting"]["_target_"].endswith(".Simple")
    assert plan.config["model"]["autoencoder"]["sample_posterior"]


def test_the_size_of_the_pictures_is_that_of_the_unet(filled):
    assert filled()["data"]["image_size"] == 32


@pytest.mark.parametrize("train", ["[]", "[vae]", "[text_encoder]", "[unet,unets]"])
def test_parts_that_cannot_be_trained_are_refused(filled, train):
    with pytest.raises(UserError) as refused:
        filled(f"model.train={train}")
    assert refused.value.key == "model.train"


def test_gradient_checkpointing_changes_no_gradient(model, build_model, config):
    checkpointed = build_model(with_values(config, "model.unet.gradient_checkpointing=true"))
    gradients = []
    for each in (copy.deepcopy(model), checkpointed):
        assert each.unet.net.is_gradient_checkpointing == (each is checkpointed)
        each.train()
        context = each.conditioner(inputs(PROMPTS)).context
        torch.manual_seed(0)
        each.unet(torch.randn(2, 4, 8, 8), torch.zeros(2), context).square().mean().backward()
        gradients.append(each.unet.net.conv_in.weight.grad)
    assert torch.equal(*gradients)


UNSEEN = ["callbacks.samples.every=0", "validation=none", "data.size=16"]
"""Of a run that nobody looks at, but with averaged weights."""


@pytest.fixture(scope="module")
def finetuned(train_tiny, chosen, tmp_path_factory):
    """A run of four steps, with a checkpoint after each two."""
    run = tmp_path_factory.mktemp("finetuned") / "run"
    result = train_tiny(run, *chosen, *UNSEEN, "trainer.max_images=32")
    assert result.code == 0, result.err
    return run


def test_a_checkpoint_holds_what_is_trained(finetuned, pipeline):
    saved = load_file(newest(finetuned) / "model.safetensors")
    assert {name.partition(".")[0] for name in saved} == {"unet"}
    first = "unet.net.conv_in.weight"
    assert not torch.equal(saved[first], pipeline.unet.conv_in.weight)


def test_a_trained_text_encoder_is_in_the_checkpoint(run_of, chosen, pipeline):
    both = ["model.train=[unet,text_encoder]", "model.conditioner.trained=true"]
    run = run_of("run", *chosen, *UNSEEN, *both, "trainer.max_images=16")
    saved = load_file(newest(run) / "model.safetensors")
    assert {name.partition(".")[0] for name in saved} == {"unet", "conditioner"}
    name = "conditioner.net.final_layer_norm.weight"
    assert not torch.equal(saved[name], pipeline.text_encoder.final_layer_norm.weight)


def test_resumed_in_the_middle_it_ends_in_the_same_weights(finetuned, train_tiny, chosen, tmp_path):
    run = Path(shutil.copytree(finetuned, tmp_path / "run"))
    for checkpoint in sorted((run / "checkpoints").iterdir())[1:]:
        shutil.rmtree(checkpoint)
    result = train_tiny(run, *chosen, *UNSEEN, "trainer.max_images=32", "resume=must")
    assert result.code == 0, result.err
    assert same(tensors(newest(run)), tensors(newest(finetuned)))


def test_it_is_drawn_with_where_the_pipeline_has_moved_to(folder, run_of, here, tmp_path):
    """And with the same weights only."""
    before = Path(shutil.copytree(folder, tmp_path / "before"))
    chosen = ["model=stable_diffusion", f"model.pretrained={before}", "data.image_size=32"]
    run = run_of("run", *chosen, *BARE, "trainer.max_images=8", "data.size=8")
    elsewhere = before.rename(tmp_path / "elsewhere")

    def draw(*words: str):
        common = ["prompt=x", "num_images=1", "steps=2", f"output={run}/drawn"]
        return here("sdtrain-sample", f"checkpoint={run}", "ema=false", *common, *words)

    missing = draw()
    assert missing.code == 2
    assert "model.pretrained" in missing.paragraph
    assert draw(f"model.pretrained={elsewhere}").code == 0
    file = elsewhere / "text_encoder/model.safetensors"
    changed = load_file(file)
    next(iter(changed.values())).add_(1)
    save_file(changed, file, metadata={"format": "pt"})
    other = draw(f"model.pretrained={elsewhere}")
    assert other.code == 2
    assert "sha256" in other.paragraph


def test_a_run_of_the_hub_is_drawn_with_its_revision(folder, run_of, here, tmp_path, monkeypatch):
    """Also on a machine whose cache lies elsewhere. The other branch has other weights."""
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    file = other / "text_encoder/model.safetensors"
    changed = load_file(file)
    next(iter(changed.values())).add_(1)
    save_file(changed, file, metadata={"format": "pt"})
    fill_hub_cache(tmp_path / "cache", {"main": other, "old": folder})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    source = ["model.pretrained=OWNER/NAME", "model.revision=old"]
    chosen = ["model=stable_diffusion", *source, "data.image_size=32"]
    run = run_of("run", *chosen, *BARE, "trainer.max_images=8", "data.size=8")
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    common = ["prompt=x", "num_images=1", "steps=2", "ema=false", f"output={run}/drawn"]
    for named in ([], ["model.pretrained=OWNER/NAME"]):
        drawn = here("sdtrain-sample", f"checkpoint={run}", *common, *named)
        assert drawn.code == 0, drawn.err
    drawn = here("sdtrain-sample", "checkpoint=OWNER/NAME", *common[:-1], f"output={run}/hub")
    assert drawn.code == 0, drawn.err


def test_frozen_parts_in_half_precision_give_nearly_the_same(model, build_model, composed_config):
    whole = model
    half = build_model(composed_config("model.frozen_dtype=bf16"))
    for part in (half.conditioner.net, half.autoencoder.net):
        assert {p.dtype for p in part.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in half.unet.parameters()} == {torch.float32}
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pairs = [
        (whole.conditioner(inputs(PROMPTS)).context, half.conditioner(inputs(PROMPTS)).context),
        (whole.latents(image), half.latents(image)),
        (
            whole.autoencoder.decode(whole.latents(image)),
            half.autoencoder.decode(whole.latents(image)),
        ),
    ]
    for exact, rounded in pairs:
        assert rounded.dtype == torch.float32
        assert 0 < (rounded - exact).abs().mean() < 0.05 * exact.std()


def test_a_trained_text_encoder_is_not_rounded(build_model, composed_config):
    words = ["model.frozen_dtype=fp16", "model.train=[unet,text_encoder]"]
    model = build_model(composed_config(*words))
    assert {p.dtype for p in model.conditioner.parameters()} == {torch.float32}
    assert {p.dtype for p in model.autoencoder.parameters()} == {torch.float16}


def test_depth_added_to_a_pipeline_changes_nothing_at_first(
    pipeline, build_model, tiny, composed, chosen
):
    """The network's output is that of the pipeline, bit for bit; the new weights learn."""
    words = prepare_arguments([*chosen, "data.size=8", "model/conditioner=[text,depth]"])
    model = build_model(composed(*tiny(*words)))
    asked = inputs(PROMPTS)
    asked.depth = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    timestep = torch.tensor([3.0, 900.0])
    found = model.network(model.condition(asked))(x, timestep)
    context = model.conditioner(asked).context
    assert torch.equal(found, pipeline.unet(x, timestep, context).sample)
    found.square().sum().backward()
    gradient = model.unet.net.conv_in.weight.grad
    assert gradient.shape[1] == 5
    assert gradient[:, 4].abs().max() > 0


def test_inpainting_added_to_a_pipeline_changes_only_the_rounding_at_first(
    pipeline, build_model, tiny, composed, chosen
):
    """Nine channels are another convolution kernel."""
    words = prepare_arguments([*chosen, "data.size=8", "model/channels=[inpainting]"])
    model = build_model(composed(*tiny(*words)))
    generator = torch.Generator().manual_seed(1)
    pictures = torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1
    mask = torch.zeros(2, 1, 32, 32, dtype=torch.bool)
    mask[..., :16] = True
    asked = replace(inputs(PROMPTS), masked=model.masked_pictures(pictures, mask))
    x = torch.randn(2, 4, 8, 8, generator=generator)
    timestep = torch.tensor([3.0, 900.0])
    found = model.network(model.condition(asked))(x, timestep)
    context = model.conditioner(asked).context
    expected = pipeline.unet(x, timestep, context).sample
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    found.square().sum().backward()
    gradient = model.unet.net.conv_in.weight.grad
    assert gradient.shape[1] == 9
    assert (gradient[:, 4:].abs().amax((0, 2, 3)) > 0).all()


def test_a_pipeline_that_reads_depth_maps_is_read_with_them(
    folder, build_model, composed_config, tmp_path
):
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False)
    add_input_channels(unet, 5)
    torch.nn.init.normal_(unet.conv_in.weight)
    deep = shutil.copytree(folder, tmp_path / "deep")
    unet.save_pretrained(deep / "unet")
    model = build_model(composed_config(f"model.pretrained={deep}"))
    assert list(model.channels) == ["depth"]
    assert torch.equal(model.unet.net.conv_in.weight, unet.conv_in.weight)
    with pytest.raises(UserError) as caught:  # whose weights would read the mask
        composed_config(f"model.pretrained={deep}", "model/channels=[inpainting]")
    assert caught.value.key == "model/channels"
    composed_config(f"model.pretrained={deep}", "model/channels=[depth]")


def test_an_adapter_leaves_its_frozen_unet_in_half_precision(build_model, composed_config):
    """The adapter itself and the output are in full precision."""
    model = build_model(composed_config("model.frozen_dtype=bf16", "adapter=lora"))
    trained = model.trained_parameters()
    assert trained
    for name, parameter in model.named_parameters():
        if name.startswith("unet."):
            expected = torch.float32 if name in trained else torch.bfloat16
            assert parameter.dtype == expected, name
    x = torch.zeros(1, 4, 4, 4)
    context = torch.zeros(1, 5, model.conditioner.context_dim)
    assert model.unet(x, torch.tensor([3.0]), context).dtype == torch.float32
