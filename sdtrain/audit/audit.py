"""What sdtrain-schedule does: every combination that was named, side by side."""

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sdtrain.assemble.model import build, build_schedule, check_all, fitting_objective, root
from sdtrain.config.boundary import typed_keys
from sdtrain.config.check import check_call
from sdtrain.config.overrides import prepared
from sdtrain.diffusion import Density, Objective
from sdtrain.errors import UserError
from sdtrain.evaluation.look import writable
from sdtrain.paths import config_dir
from sdtrain.runs.checkpoint import write_text
from sdtrain.schedules import Schedule

STEPS = (10, 25, 50)
GROUPS = ("schedule", "modifiers", "prediction", "weighting", "loss", "times", "noise", "grid")
READ = {
    *GROUPS,
    "experiment",
    "sampler",
}  # an experiment brings a weighting along, sampler=euler a grid
PLOTTED = 20.0  # log_snr beyond it is not drawn and not compared


@dataclass
class Entry:
    """One combination, and what it amounts to. weight [N]: the effective weight at log_snr [N], of unit integral; None where refused."""

    name: str
    cfg: dict
    schedule: Schedule
    refused: str | None = None
    notes: list[str] = field(default_factory=list)
    log_snr: Tensor | None = None
    weight: Tensor | None = None
    duplicate_of: list[str] = field(default_factory=list)
    same_objective_as: list[str] = field(default_factory=list)

    @property
    def terminal(self) -> tuple[float, float]:
        """(alpha, sigma) at t = 1."""
        return tuple(
            c.item()
            for c in self.schedule.alpha_sigma(torch.ones((), dtype=torch.float64), torch.float64)
        )

    @property
    def steps(self) -> list[int]:
        """Of STEPS those that the schedule has timesteps for."""
        return [steps for steps in STEPS if steps <= self.schedule.num_timesteps]

    def visited(self, steps: int) -> list[float]:
        """The log_snrs that a sampler visits."""
        return self.schedule.log_snr(build(self.cfg["grid"], "grid")(steps, self.schedule)).tolist()

    def choice(self, group: str) -> str:
        """What was chosen, as the option is called: weightings by their file, the others by their class or function."""
        module, _, name = self.cfg[group]["_target_"].rpartition(".")
        return module.rpartition(".")[2] if group == "weighting" else name.lower()

    def record(self) -> dict[str, Any]:
        alpha, sigma = self.terminal
        t = torch.linspace(0, 1, 101, dtype=torch.float64)
        return {
            "name": self.name,
            "schedule": self.schedule.name,
            **{
                group: self.choice(group)
                for group in GROUPS
                if group not in ("schedule", "modifiers")
            },
            "num_timesteps": self.schedule.num_timesteps,
            "terminal_snr": (alpha / sigma) ** 2,
            "terminal_alpha": alpha,
            "leaked_mean": alpha,
            "leaked_variance": alpha**2 / (alpha**2 + sigma**2),
            "log_snr_at_0": self.schedule.log_snr_max,
            "log_snr_at_1": self.schedule.log_snr_min,
            "t": t.tolist(),
            "log_snr": self.schedule.log_snr(t).tolist(),
            "visited": {str(steps): self.visited(steps) for steps in self.steps},
            "effective_weight": None
            if self.weight is None
            else {"log_snr": self.log_snr.tolist(), "weight": self.weight.tolist()},
            "duplicate_of": self.duplicate_of,
            "same_objective_as": self.same_objective_as,
            "refused": self.refused,
        }


def audit(words: list[str]) -> None:
    output, words = "schedules", prepared(words)
    for word in [w for w in words if w.startswith("output=")]:
        words.remove(word)
        output = str(OverridesParser.create().parse_override(word).value())
    if flags := [word for word in words if word.startswith("-")]:
        raise UserError(
            f"sdtrain-schedule has no flag {flags[0]}: comma lists are expanded as they are. Remove it."
        )
    entries = [entry(name, overrides) for name, overrides in combinations(words)]
    shorten(entries)
    compare(entries)
    folder, console = writable(Path(output)), Console(markup=False, highlight=False)
    # An infinity is no JSON, but a number too large for a double is, and is read as one.
    write_text(
        folder / "schedules.json",
        json.dumps([e.record() for e in entries], indent=1).replace("Infinity", "1e999") + "\n",
    )
    draw(entries, folder / "schedules.png")
    console.print(table(entries))
    for each in entries:
        for note in each.notes:
            console.print(f"{each.name}: {note}", soft_wrap=True)
    if idle := sorted(key for key in typed_keys(words) if key.partition(".")[0] not in READ):
        console.print(f"No effect here, only on a run: {', '.join(idle)}.", soft_wrap=True)
    console.print(f"Written to {folder}: schedules.png, schedules.json", soft_wrap=True)
    if all(e.refused for e in entries):
        raise UserError(entries[0].refused)


def combinations(words: list[str]) -> list[tuple[str, list[str]]]:
    """(what varies, the overrides) of every combination of the comma lists, in the order in which they were typed."""
    parsed = OverridesParser.create().parse_overrides(words)
    choices = [list(o.sweep_string_iterator()) if o.is_sweep_override() else None for o in parsed]
    each = [
        [f"{o.get_key_element()}={value}" for value in values] if values else [o.input_line]
        for o, values in zip(parsed, choices, strict=True)
    ]
    varied = [
        place
        for place, values in enumerate(choices)
        if values and parsed[place].get_key_element() not in ("schedule", "modifiers")
    ]
    found = []
    for combination in itertools.product(*each):
        names = [
            combination[place].rpartition("=")[2]
            if "." not in combination[place].partition("=")[0]
            else combination[place]
            for place in varied
        ]
        found.append((", ".join(names), list(combination)))
    return found


def entry(varying: str, overrides: list[str]) -> Entry:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = OmegaConf.to_container(compose("train", overrides), resolve=True)
    check_call(cfg, "", root, set(), typed_keys(overrides))
    cfg = {group: cfg.get(group) or {} for group in GROUPS}
    if missing := [group for group in GROUPS if not cfg[group] and group != "modifiers"]:
        raise UserError(f"{missing[0]} is missing. Choose one with {missing[0]}=NAME.")
    notes, typed = check_all(cfg, typed_keys(overrides)), typed_keys(overrides)
    made = Entry(varying, cfg, build_schedule(cfg), notes=notes)
    made.name = ", ".join(filter(None, [made.schedule.name, varying]))
    try:
        for steps in made.steps:
            made.visited(steps)
    except ValueError as error:
        raise UserError(f"{error}. Change grid.") from error
    try:
        objective = fitting_objective(cfg, typed, made.notes)
    except UserError as error:
        made.refused = " ".join(str(error).split())
        made.notes.append(f"refused. {made.refused}")
    else:
        made.log_snr, made.weight = effective_weight(objective) or (None, None)
    return made


def effective_weight(objective: Objective) -> tuple[Tensor, Tensor] | None:
    """(log_snr [N], density under the base law times w, [N]), of unit integral; None where all levels lie beyond what is drawn."""
    schedule = objective.schedule
    ends = objective.times.quantile(
        torch.tensor([1.0, 0.0], dtype=torch.float64), schedule
    )  # a window of times sees a part alone
    low, high = schedule.log_snr(ends).clamp(-PLOTTED, PLOTTED).tolist()
    if not low < high:
        return None
    log_snr = torch.linspace(low, high, 1001, dtype=torch.float64)
    alpha, sigma = (
        c.flatten()
        for c in schedule.alpha_sigma(schedule.time_of(log_snr, clamp=True), torch.float64)
    )
    weight = Density(schedule, objective.times)(log_snr) * objective.weighting(
        log_snr, objective.prediction.jacobian(alpha, sigma)
    )
    return log_snr, weight / torch.trapezoid(weight, log_snr)


def shorten(entries: list[Entry]) -> None:
    """Two of one name get a number."""
    for name in {e.name for e in entries}:
        same = [e for e in entries if e.name == name]
        for number, each in enumerate(same[1:], 2):
            each.name = f"{name} ({number})"


def compare(entries: list[Entry]) -> None:
    """Equal effective weights, up to a factor that Adam ignores, with equal loss and noise: with the same prediction they are duplicates,
    else the same objective said otherwise."""
    for one, other in itertools.permutations([e for e in entries if e.weight is not None], 2):
        same_output = one.cfg["prediction"] == other.cfg["prediction"]
        alike = (
            one.cfg["loss"] == other.cfg["loss"]
            and one.cfg["noise"] == other.cfg["noise"]
            and one.schedule.num_timesteps == other.schedule.num_timesteps
        )
        if not same_output and one.choice("loss") != "mse":
            continue  # only squares turn from one output to another by a factor
        if (
            alike
            and torch.allclose(one.log_snr, other.log_snr, atol=1e-6)
            and torch.allclose(one.weight, other.weight, rtol=1e-6, atol=1e-12)
        ):
            (one.duplicate_of if same_output else one.same_objective_as).append(other.name)
    for each in entries:
        each.notes += [f"duplicate of {', '.join(each.duplicate_of)}"] if each.duplicate_of else []
        each.notes += (
            [f"same objective, other parameterisation: {', '.join(each.same_objective_as)}"]
            if each.same_objective_as
            else []
        )


def table(entries: list[Entry]) -> Table:
    caption = "SNR, mean, variance: what is left of the data at t = 1. Half the loss: the middle half for a linear denoiser of unit-variance latents."
    shown = Table(
        box=box.SIMPLE_HEAD, caption=caption, caption_justify="left", padding=(0, 1, 0, 0)
    )
    shown.add_column("", overflow="fold")
    for head in ("log_snr", "SNR", "mean", "variance", "half the loss"):
        shown.add_column(head, justify="right", no_wrap=True)
    for each in entries:
        alpha, sigma = each.terminal
        half = "refused" if each.refused else ""
        if each.weight is not None:
            low, high = middle_half(each.log_snr, each.weight * each.log_snr.sigmoid())
            half = f"{low:.1f} .. {high:.1f}"
        variance = alpha**2 / (alpha**2 + sigma**2)
        numbers = (
            f"{each.schedule.log_snr_max:.2f} .. {each.schedule.log_snr_min:.2f}",
            f"{(alpha / sigma) ** 2:.2g}",
            f"{100 * alpha:.2g} %",
        )
        shown.add_row(each.name, *numbers, f"{100 * variance:.2g} %", half)
    return shown


def middle_half(x: Tensor, density: Tensor) -> tuple[float, float]:
    """The quartiles of an unnormalised density at rising x."""
    share = torch.cumulative_trapezoid(density, x)
    return tuple(
        x[1:][(share >= quarter * share[-1]).nonzero()[0]].item() for quarter in (0.25, 0.75)
    )


def draw(entries: list[Entry], path: Path) -> None:
    """log_snr over t, the effective weight over log_snr, and the levels that sampling visits."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.4 + 0.42 * len(entries)), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subfigures(2, 1, height_ratios=(4.4, 1.0 + 0.42 * len(entries)))
    (curves, weights), levels = above.subplots(1, 2), below.subplots()
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    for number, each in enumerate(entries):
        style = {
            "color": f"C{number % 10}",
            "linestyle": ("-", "--", ":", "-.")[number // 10 % 4],
            "linewidth": 1.6,
        }
        curves.plot(t, each.schedule.log_snr(t).clamp(-PLOTTED, PLOTTED), label=each.name, **style)
        if each.weight is not None:
            weights.plot(each.log_snr, each.weight, label=each.name, **style)
        for row, steps in enumerate(each.steps):
            values = [min(max(v, -PLOTTED), PLOTTED) for v in each.visited(steps)]
            levels.plot(
                values,
                [len(entries) - number - 0.25 * row] * len(values),
                "|",
                markersize=6,
                color=style["color"],
            )
    curves.set(xlabel="t", ylabel="log_snr", title="log_snr over time")
    weights.set(
        xlabel="log_snr",
        ylabel="density x weight, unit area",
        title="effective weight on the error of epsilon",
        yscale="log",
    )
    weights.set_ylim(bottom=1e-4)
    levels.set(
        xlabel="log_snr",
        title=f"levels visited by {', '.join(map(str, STEPS))} steps (from the top), grid {entries[0].choice('grid')}",
    )
    levels.set_yticks(
        [len(entries) - number - 0.25 for number in range(len(entries))], [e.name for e in entries]
    )
    levels.set_ylim(0.2, len(entries) + 0.4)
    for axes in (weights, levels):
        axes.invert_xaxis()  # noise to the right, as over t
    curves.legend(fontsize="small")
    for axes in (curves, weights, levels):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    beside = path.with_name(f".{path.name}.tmp")
    figure.savefig(beside, format="png", dpi=110)
    beside.rename(path)
