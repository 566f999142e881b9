"""What sdtrain-sample and sdtrain-evaluate do, once Hydra has read their words."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table

from sdtrain import pictures
from sdtrain.assemble.load import Loaded, load, pick_device
from sdtrain.assemble.model import FILLED_IN, build_drawing
from sdtrain.config.boundary import typed_keys
from sdtrain.config.check import check, check_call
from sdtrain.console import fail
from sdtrain.data.shapes import COLOURS, RADII, SHAPES, Shapes, coverage, evaluation_prompts
from sdtrain.errors import StorageError, UserError
from sdtrain.evaluation.prompt_accuracy import PromptAccuracy, Verifier
from sdtrain.evaluation.retrieval import nearest_picture_share
from sdtrain.generation.generate import Drawing, Request, by_steps, draws_noise, generate
from sdtrain.plots import sampler_errors
from sdtrain.runs.checkpoint import published, write_text
from sdtrain.runs.reader import read_evaluation, sweep_arms
from sdtrain.training.session import quiet

Accelerator = Literal["auto", "cpu", "gpu"]
Metric = Literal["prompt_accuracy", "retrieval", "sampler_error"]
STEPS = (10, 15, 25, 50, 100, 250, 500)  # of sampler_error, against REFERENCE
REFERENCE = 1000


def sample_root(
    *,
    checkpoint: str,
    prompt: list[str] | str | None,
    prompt_file: str | None,
    negative_prompt: str,
    label: list[int] | int | None,
    num_images: int,
    seed: int,
    steps: int,
    sampler: object,
    grid: object,
    guidance: object,
    guidance_scale: float,
    output: str,
    batch_size: int,
    ema: bool,
    accelerator: Accelerator,
    autoencoder: str | None,
    allow: list[str],
) -> None:
    """The schema of sdtrain-sample's keys."""


def evaluate_root(
    *,
    checkpoint: str,
    metrics: list[Metric] | Metric,
    num_images: int,
    seed: int,
    steps: int,
    sampler: object,
    grid: object,
    guidance: object,
    guidance_scale: float | None,
    output: str | None,
    batch_size: int,
    ema: bool,
    accelerator: Accelerator,
    autoencoder: str | None,
    allow: list[str],
) -> None:
    """The schema of sdtrain-evaluate's keys."""


def bounded(
    command: Callable[[dict, Console], None], cfg: Any, root: Callable, overrides: list[str]
) -> None:
    """Runs a command inside the error boundary: one paragraph and an exit code for whatever goes wrong."""
    quiet()
    try:
        cfg, typed = (
            OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True),
            typed_keys(overrides),
        )
        check_call(cfg, "", root, set(), typed)
        for name in ("sampler", "grid", "guidance"):
            if not cfg[name]:
                raise UserError(f"{name} is missing. Choose one with {name}=NAME.")
            check(cfg[name], name, FILLED_IN, typed)
        for name in ("num_images", "steps", "batch_size"):
            if cfg[name] < 1:
                raise UserError(f"{name}={cfg[name]} must be at least 1.")
        command(cfg, Console(markup=False, highlight=False))
    except OmegaConfBaseException as error:
        fail(2, f"{str(error).splitlines()[0]}. Set {error.full_key}=...")
    except UserError as error:
        fail(error.exit_code, " ".join(str(error).split()))
    except OSError as error:
        fail(5, f"{error.strerror}: {error.filename}. Set output to another place.")
    except KeyboardInterrupt:
        sys.exit(130)


def writable(folder: Path, key: str = "output") -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".sdtrain.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StorageError(
            f"{key}={folder} cannot be written: {error.strerror}. Give another folder in {key}."
        ) from error
    return folder


def loaded(cfg: dict) -> Loaded:
    return load(
        cfg["checkpoint"],
        ema=cfg["ema"],
        device=pick_device(cfg["accelerator"]),
        allow=cfg["allow"],
        autoencoder=cfg["autoencoder"],
    )


def requests_of(cfg: dict, model: Loaded) -> list[Request]:
    """num_images pictures of each prompt or label, each with the seeds seed, seed + 1, ..."""
    reads, prompts, labels = (
        model.module.conditioner.reads,
        _listed(cfg["prompt"]),
        _listed(cfg["label"]),
    )
    if cfg["prompt_file"] is not None:
        try:
            prompts += [
                line.strip()
                for line in Path(cfg["prompt_file"]).read_text(encoding="utf-8-sig").splitlines()
                if line.strip()
            ]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"prompt_file={cfg['prompt_file']} cannot be read as UTF-8 text: {error}. Give a file with one prompt a line."
            ) from error
    if reads != "caption" and (prompts or cfg["negative_prompt"]):
        raise UserError(
            f"prompt has no effect: this model reads {'a class label. Set label=NUMBER' if reads == 'label' else 'no condition. Remove prompt'}."
        )
    if reads != "label" and labels:
        raise UserError(
            "label has no effect: this model was not trained with model/conditioner=class_label. Remove label."
        )
    if reads == "caption" and not prompts:
        raise UserError(
            'prompt is missing: say what to draw with prompt="...", several times for several, or give prompt_file=FILE with one a line.'
        )
    if reads == "label" and not labels:
        raise UserError(
            "label is missing: say which class to draw with label=NUMBER or label=[NUMBER,NUMBER]."
        )
    if reads == "label" and not all(
        0 <= label < model.module.conditioner.num_classes for label in labels
    ):
        raise UserError(
            f"label={labels} must lie between 0 and {model.module.conditioner.num_classes - 1}."
        )
    if cfg["negative_prompt"] and cfg["guidance_scale"] == 1:
        raise UserError(
            "negative_prompt has no effect at guidance_scale=1, which asks the conditional network alone. Raise guidance_scale."
        )
    seeds = range(cfg["seed"], cfg["seed"] + cfg["num_images"])
    if reads == "caption":
        return [
            Request(seed, prompt=prompt, negative_prompt=cfg["negative_prompt"])
            for prompt in prompts
            for seed in seeds
        ]
    return [Request(seed, label=label) for label in labels or [0] for seed in seeds]


def _listed(value: Any) -> list:
    return [] if value is None else value if isinstance(value, list) else [value]


def sample(cfg: dict, console: Console) -> None:
    """Draws, and writes PNGs that carry prompt, seed and settings, and a grid."""
    output = Path(cfg["output"])
    model = loaded(cfg)
    drawing, requests = build_drawing(cfg, model.module.objective.schedule), requests_of(cfg, model)
    writable(output)
    images = generate(model.module, requests, drawing, model.data.image_size)
    settings = {key: cfg[key] for key in ("steps", "guidance_scale", "ema")} | {
        "sampler": cfg["sampler"]["_target_"],
        "checkpoint": str(model.folder),
    }
    captions = []
    for number, (request, image) in enumerate(zip(requests, images, strict=True)):
        said = {key: value for key, value in vars(request).items() if key == "seed" or value}
        picture = pictures.picture(image)
        pictures.write_png(
            picture, output / f"{number:05d}-seed{request.seed}.png", said | settings
        )
        captions.append(
            request.prompt
            or (
                f"class {request.label}"
                if model.module.conditioner.reads == "label"
                else f"seed {request.seed}"
            )
        )
    columns = cfg["num_images"] if 1 < cfg["num_images"] <= 8 else 4
    pictures.write_png(pictures.grid(images, captions, columns), output / "grid.png", settings)
    console.print(f"{len(images)} pictures and grid.png in {output}", soft_wrap=True)


def evaluate(cfg: dict, console: Console) -> None:
    """Measures a run, or each arm of a sweep that has a checkpoint."""
    arms = sweep_arms(Path(cfg["checkpoint"]).expanduser())
    if arms is None:
        return evaluate_run(cfg, console)
    failed = None
    for arm in arms:
        console.print(arm.name, soft_wrap=True)
        if not published(arm):
            console.print("no checkpoint: not evaluated")
            continue
        try:
            evaluate_run(
                cfg
                | {
                    "checkpoint": str(arm),
                    "output": cfg["output"] and f"{cfg['output']}/{arm.name}",
                },
                console,
            )
        except UserError as error:  # the others can be measured
            console.print(f"not evaluated: {error}", soft_wrap=True)
            failed = failed or type(error)(f"{arm.name} could not be evaluated: {error}")
    if failed:
        raise failed


def evaluate_run(cfg: dict, console: Console) -> None:
    """Prints a table, writes JSON."""
    model = loaded(cfg)
    if cfg["guidance_scale"] is None:
        cfg["guidance_scale"] = model.cfg["guidance_scale"]
    drawing = build_drawing(cfg, model.module.objective.schedule)
    output = Path(cfg["output"]) if cfg["output"] else model.run_dir / "evaluation"
    writable(output)
    settings = {
        "checkpoint": str(model.folder),
        "num_images": cfg["num_images"],
        "seed": cfg["seed"],
        "steps": cfg["steps"],
        "guidance_scale": cfg["guidance_scale"],
        "sampler": cfg["sampler"]["_target_"],
        "ema": cfg["ema"],
    }
    measures = {
        "prompt_accuracy": prompt_accuracy,
        "retrieval": retrieval,
        "sampler_error": sampler_error,
    }
    before = read_evaluation(
        output
    )  # other metrics of this checkpoint stay, with the settings that they were measured with
    known = before.get("settings") if isinstance(before.get("settings"), dict) else {}
    same = lambda theirs: (  # noqa: E731
        isinstance(theirs, dict) and theirs.get("checkpoint") == settings["checkpoint"]
    )
    kept = {metric: theirs for metric, theirs in known.items() if metric in before and same(theirs)}
    result: dict[str, Any] = (
        settings | {"settings": kept} | {metric: before[metric] for metric in kept}
    )
    for metric in dict.fromkeys(_listed(cfg["metrics"])):
        result[metric], result["settings"][metric] = (
            measures[metric](cfg, model, drawing, output),
            settings,
        )
        table = Table("", *result[metric], title=metric)
        for name in next(iter(result[metric].values())):
            table.add_row(
                name.replace("_", " "),
                *(f"{100 * column[name]:.1f} %" for column in result[metric].values()),
            )
        console.print(table)
    write_text(output / "evaluation.json", json.dumps(result, indent=1) + "\n")
    console.print(f"Written to {output}", soft_wrap=True)


def caption_reader(model: Loaded, metric: str) -> None:
    if model.module.conditioner.reads != "caption":
        raise UserError(
            f"metrics={metric} asks with captions, which this model does not read: it was trained with another model/conditioner."
        )


def prompt_accuracy(cfg: dict, model: Loaded, drawing, output: Path) -> dict[str, dict[str, float]]:
    """Trained combinations beside those that were held out of training."""
    caption_reader(model, "prompt_accuracy")
    if not isinstance(model.data, Shapes):
        raise UserError(
            "metrics=prompt_accuracy reads flat shapes: it needs a run with data=shapes. Choose metrics=retrieval for pictures."
        )
    verifier, result = Verifier(shapes=SHAPES, palette=COLOURS, radii=RADII, coverage=coverage), {}
    for name, held_out in (("trained", False), ("held_out", True)):
        asked = evaluation_prompts(cfg["num_images"], held_out, cfg["seed"])
        requests = [Request(cfg["seed"] + i, prompt=prompt) for i, (prompt, _) in enumerate(asked)]
        images = generate(model.module, requests, drawing, model.data.image_size)
        metric = PromptAccuracy(verifier=verifier)
        metric.update(images, [what for _, what in asked])
        result[name] = metric.compute()
        pictures.write_png(
            pictures.grid(images[:64], [prompt for prompt, _ in asked[:64]], columns=8),
            output / f"prompt_accuracy-{name}.png",
        )
    return result


def retrieval(cfg: dict, model: Loaded, drawing, output: Path) -> dict[str, dict[str, float]]:
    """Of pictures drawn for training captions, the share whose nearest training picture, in latents, is the captioned one."""
    caption_reader(model, "retrieval")
    train = model.data.split("train")
    if len(train) > 20000:
        raise UserError(
            f"metrics=retrieval compares with every training picture; {len(train)} are too many for that. Choose metrics=prompt_accuracy."
        )
    count = min(cfg["num_images"], len(train))
    rows = [train[(index, index)] for index in range(len(train))]
    with torch.no_grad():
        encode = model.module.autoencoder.encode
        latents = torch.cat(
            [
                encode(batch.to(model.module.device)).cpu()
                for batch in torch.stack([row.image for row in rows]).split(128)
            ]
        )
        wanted = [i * len(train) // count for i in range(count)]
        images = generate(
            model.module,
            [Request(cfg["seed"] + i, prompt=rows[i].caption) for i in wanted],
            drawing,
            model.data.image_size,
        )
        drawn = encode(images.to(model.module.device)).cpu()
    pairs = torch.stack(
        [torch.stack([rows[i].image, image]) for i, image in zip(wanted, images, strict=True)]
    )
    title = "training pictures over what their captions drew"
    sheet = pictures.grid(
        torch.cat([pairs[:, 0], pairs[:, 1]], dim=2),
        [rows[i].caption for i in wanted],
        columns=8,
        title=title,
    )
    pictures.write_png(sheet, output / "retrieval.png")
    shares = nearest_picture_share(drawn, latents, torch.tensor(wanted))
    return {"measured": shares, "chance": {"top_1": 1 / len(train), "top_5": 5 / len(train)}}


def sampler_error(
    cfg: dict, model: Loaded, drawing: Drawing, output: Path
) -> dict[str, dict[str, float]]:
    """How far pictures of few steps are from those of 1000, see generate.by_steps: "50 steps" then is a choice that was measured."""
    reference = min(REFERENCE, model.module.objective.schedule.num_timesteps)
    if draws_noise(drawing):
        name = cfg["sampler"]["_target_"].rpartition(".")[2]
        raise UserError(
            f"metrics=sampler_error follows the same noise through more steps, and sampler={name} draws fresh noise at each. Choose sampler=ddim."
        )
    prompts = (
        model.data.example_prompts(cfg["num_images"])
        if model.module.conditioner.reads == "caption"
        else [""] * cfg["num_images"]
    )
    requests = [Request(cfg["seed"] + i, prompt=prompt) for i, prompt in enumerate(prompts)]
    if not (steps := [each for each in STEPS if each < reference]):
        raise UserError(
            f"metrics=sampler_error compares {STEPS[0]} steps and more; this run has schedule.num_timesteps={reference}. Choose another metric."
        )
    drawn, far = by_steps(
        model.module, requests, drawing, model.data.image_size, [*steps, reference]
    )
    for name, picture in zip(
        ("sampler_error", "sampler_error-curve"), sampler_errors(drawn, far, prompts), strict=True
    ):
        pictures.write_png(picture, output / f"{name}.png")
    measures = {"mean": torch.Tensor.mean, "largest": torch.Tensor.max}
    return {
        name: {f"{each} steps": measure(distance).item() for each, distance in far.items()}
        for name, measure in measures.items()
    }
