"""What a person reads before and after a run."""

from pathlib import Path

from rich.console import Console
from rich.text import Text

from sdtrain.runs.checkpoint import published
from sdtrain.training.run import Run


def _table(console: Console, title: str, rows: list[tuple[str, str]]) -> None:
    """Names and values in two columns. Long lines are left to the terminal: a path or a command can be copied whole."""
    console.print(Text(title, style="bold"))
    for name, value in rows:
        console.print(Text(f"  {name:<13}", style="cyan"), Text(value), sep="", soft_wrap=True)


def _count(parameters) -> str:
    return f"{sum(p.numel() for p in parameters) / 1e6:.2f} M"


def name_of(node: dict) -> str:
    return node["_target_"].rpartition(".")[2]


def before(run: Run) -> None:
    cfg, module, settings = run.cfg, run.module, run.settings
    if run.is_diffusion:
        trained = (
            ", ".join(
                f"{name_of(cfg['model'][part])} {_count(getattr(module, part).parameters())}"
                for part in ("unet", "conditioner")
            )
            + " parameters"
        )
        shape = module.autoencoder.latent_shape(run.data.image_size)
        where = f"{cfg['model']['autoencoder'].get('path', 'pixels')}, latents {' x '.join(map(str, shape))}, scale {module.autoencoder.latent_scale:.4g}"
        objective = f"prediction {name_of(cfg['prediction'])}, schedule {module.objective.schedule.name}, weighting {name_of(cfg['weighting'])}"
        kind = [("autoencoder", where), ("objective", objective)]
    else:
        trained, kind = f"AutoencoderKL {_count(module.parameters())} parameters", []
    train, held_out, size = (
        len(run.datamodule.train),
        len(run.datamodule.validation),
        run.data.image_size,
    )
    ranks = f", {settings.devices} ranks" if settings.devices > 1 else ""
    _table(
        run.console,
        f"sdtrain: {cfg['name']}",
        [
            ("trains", trained),
            *kind,
            ("pictures", f"{train} of {size} x {size} for training, {held_out} for validation"),
            (
                "budget",
                f"{settings.max_images} images in batches of {run.datamodule.batch_size}{ranks}, lr {run.cfg['optimizer'].get('lr')}, seed {cfg['seed']}",
            ),
            ("writes", str(run.run_dir)),
        ],
    )


def after(run: Run) -> None:
    latest = (
        run.metrics_log.latest
        | (run.validation.latest if run.validation else {})
        | getattr(run.by_name.get("noise_levels"), "latest", {})
    )
    numbers = ", ".join(
        f"{key} {value:.4g}"
        for key, value in latest.items()
        if key in ("train/loss",) or key.startswith("validation/")
    )
    grid = next(
        (
            callback.last_grid
            for callback in run.by_name.values()
            if getattr(callback, "last_grid", None)
        ),
        None,
    )
    saved = published(run.run_dir)
    folder = _quote(run.run_dir)
    if run.is_diffusion:
        prompt = run.data.example_prompts(1)[0]
        asked = f'prompt="{prompt}" ' if run.module.conditioner.reads == "caption" else ""
        following = f"sdtrain-sample checkpoint={folder} {asked}output=samples"
    else:
        following = f"sdtrain model.autoencoder.path={folder}/autoencoder"
    rows = (
        [("result", numbers)]
        + ([("samples", str(grid))] if grid else [])
        + ([("checkpoint", str(saved[-1]))] if saved else [])
    )
    _table(
        run.console,
        f"finished: {run.datamodule.images_seen} images seen",
        [*rows, ("next", following)],
    )


def _quote(path: Path) -> str:
    text = str(path)
    return text if all(c.isalnum() or c in "/._-" for c in text) else f"'{text}'"
