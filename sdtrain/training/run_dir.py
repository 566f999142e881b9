"""Chooses the run's folder before Hydra creates it. Imports torch only to search for a run to
resume.
"""

import tempfile

from sdtrain.config.compose import compose_config
from sdtrain.config.flags import read_flags
from sdtrain.config.launch import is_started_by_launcher, rank_before_config, rank_for_config
from sdtrain.config.overrides import quoted, typed_values
from sdtrain.config.precheck import precheck_config


def run_dir_overrides(arguments: list[str]) -> list[str]:
    """Return the override of hydra.run.dir for a run whose folder does not follow from ${now:...};
    [] for other runs, or if the user has set it.

    For resume=auto, the override names the folder of the run to resume. For a rank above 0 that a
    launcher started, which would resolve ${now:...} to a time of its own, it names a temporary
    folder: all ranks use rank 0's in the end.
    """
    flags, words = read_flags(arguments)
    typed = typed_values(words)
    if "hydra.run.dir" in typed:
        return []
    folder = None
    if typed.get("resume", "auto" if flags else "never") != "never":
        prechecked = precheck_config(compose_config("train", words, flags), words)
        if prechecked.resume != "never":
            # Lightning reads the launchers' environment variables when it is imported.
            rank_for_config(prechecked.trainer.devices, is_one_process=prechecked.is_one_process)
            from sdtrain.training.resume import newest_unfinished

            folder = newest_unfinished(prechecked)
    if folder is None and is_started_by_launcher() and rank_before_config(typed) > 0:
        folder = tempfile.mkdtemp()
    return [f"hydra.run.dir={quoted(str(folder))}"] if folder else []
