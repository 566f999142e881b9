"""A sweep, checked as far as that goes without torch, before anything of it is written."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from sdtrain.config.compose import composition_words, is_of_this_moment
from sdtrain.config.draft import Draft, check_draft
from sdtrain.errors import UserError
from sdtrain.runs.layout import RunFolder, SweepFolder
from sdtrain.sweep.names import arm_names
from sdtrain.sweep.places import Places

NOT_AN_ARMS = re.compile(r"[+~]*(hydra[./]|sweep(=|$)|resume=)")
"""Words of a job that are the sweep's own, and not its arms'."""


@dataclass(frozen=True)
class SweepDraft:
    """What is going to be run.

    Args:
        folder: where it lies.
        is_of_this_moment: whether the folder's name is the time; then it lies beside it where it
            is another's.
        arms: name -> configuration and words.
        composition: words by which every arm composes from the user's own configurations.
        places: where the arms run.
    """

    folder: SweepFolder
    is_of_this_moment: bool
    arms: dict[str, Draft]
    composition: list[str]
    places: Places


def draft_sweep(
    config: DictConfig,
    jobs: Sequence[Sequence[str]],
    first: int,
    compose: Callable[[list[str]], dict],
    places: Places,
) -> SweepDraft:
    """Composes and checks every arm. Raises UserError and what Hydra raises.

    Args:
        config: the sweep's own, with its node `hydra`.
        jobs: the words of each arm, as Hydra's sweeper has made them.
        first: number of the first of them.
        compose: (words) -> resolved configuration.
    """
    places.check()
    if not jobs:
        raise UserError(
            "The sweep has no arm: one of its keys is given no value",
            key="hydra.sweeper.params",
            remedy="Write key=value,value.",
        )
    folder = SweepFolder(Path(config.hydra.sweep.dir))
    moment = is_of_this_moment(config.hydra.sweep)
    if RunFolder(folder.path).config.exists() and not moment:
        raise UserError(
            f"{folder.path.absolute()} is the folder of a run",
            key="hydra.sweep.dir",
            remedy="Choose another hydra.sweep.dir.",
        )
    words = [_own_words(job) for job in jobs]
    names = arm_names(words, first)
    configs = [compose(own) for own in words]
    if len(words) == 1:
        _refuse_lost_sweep(config, words[0])
    arms = {}
    for name, own, arm_config in zip(names, words, configs, strict=True):
        with refused_in_arm(name):
            arms[name] = check_draft(arm_config, own)
    return SweepDraft(folder, moment, arms, composition_words(config.hydra), places)


@contextmanager
def refused_in_arm(name: str) -> Iterator[None]:
    """A UserError within is reported together with the arm's name."""
    try:
        yield
    except UserError as error:
        raise error.within(f"In the arm {name}") from error


def _own_words(job: Sequence[str]) -> list[str]:
    return [word for word in job if not NOT_AN_ARMS.match(word)]


def _refuse_lost_sweep(config: DictConfig, words: list[str]) -> None:
    """UserError where a typed word has taken the place of the values that sweep=NAME varies."""
    name = config.hydra.runtime.choices.get("sweep")
    params = config.hydra.sweeper.params or {}
    swept = [key for key, values in params.items() if "," in values]
    if not swept:
        return
    typed = next(word for word in words if word.lstrip("+").partition("=")[0] in swept)
    raise UserError(
        f"sweep={name} varies {', '.join(swept)}, and {typed} leaves a single arm",
        key="sweep",
        remedy=f"Remove {typed}, or sweep={name}.",
    )
