"""Where a run lies, before Hydra makes its folder. Without torch, unless a run is looked for."""

import tempfile

from sdtrain.config.compose import compose_config
from sdtrain.config.draft import check_draft
from sdtrain.config.flags import read_flags
from sdtrain.config.launch import is_started_by_launcher, settled_rank, typed_rank
from sdtrain.config.overrides import quoted, typed_values


def run_folder(arguments: list[str]) -> list[str]:
    """The overrides that say so where ${now:...} must not decide.

    They name the run that resume=auto goes on with; and for a rank above 0, which would resolve
    ${now:...} by itself, a folder of no importance: the run's is rank 0's.
    """
    flags, words = read_flags(arguments)
    typed = typed_values(words)
    if "hydra.run.dir" in typed:
        return []
    found = None
    if typed.get("resume", "auto" if flags else "never") != "never":
        draft = check_draft(compose_config("train", words, flags), words)
        if draft.resume != "never":
            # Lightning reads the variables of launchers when it is imported.
            settled_rank(draft.trainer.devices, is_one_process=draft.is_one_process)
            from sdtrain.training.resume import newest_unfinished

            found = newest_unfinished(draft)
    if found is None and is_started_by_launcher() and typed_rank(typed) > 0:
        found = tempfile.mkdtemp()
    return [f"hydra.run.dir={quoted(str(found))}"] if found else []
