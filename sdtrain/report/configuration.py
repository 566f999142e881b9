"""The configuration keys in which the runs differ."""

import json
import os
from typing import Any

from sdtrain.report.record import MeasuredRun
from sdtrain.report.section import Section, Table
from sdtrain.runs.resume import flatten_leaves, is_added_by_run


def configuration_section(runs: list[MeasuredRun]) -> Section:
    """Return a section with a row for each key that differs; it has no parts where none does."""
    runs = [run for run in runs if run.config]  # one that has not begun has no configuration
    rows = []
    for key, values in differing_keys(runs).items():
        if not is_added_by_run(key):
            cells = ["null" if value is None else str(value) for value in values]
            rows.append([key, *shorten_around_difference(cells)])
    table = Table(["key", *(run.name for run in runs)], rows)
    return Section("Differences in configuration", [table] if rows and len(runs) > 1 else [])


def differing_keys(runs: list[MeasuredRun]) -> dict[str, list[Any]]:
    """Return {key: its value in each run} for each key that is not the same in all runs.

    The value is "" for a run without the key.
    """
    leaves = [flatten_leaves(run.config) for run in runs]
    keys = {}
    for leaves_of_run in leaves:
        keys |= dict.fromkeys(leaves_of_run)
    differing = {}
    for key in keys:
        values = [leaves_of_run.get(key, "") for leaves_of_run in leaves]
        if len({json.dumps(value) for value in values}) > 1:
            differing[key] = values
    return differing


def shorten_around_difference(values: list[str], width: int = 80) -> list[str]:
    """Return at most `width` characters of each value.

    If one is longer, all begin shortly before the place where they first differ.
    """
    start = 0
    if max(map(len, values)) > width:
        start = max(0, len(os.path.commonprefix(values)) - 20)
    before = "... " if start else ""
    shortened = []
    for value in values:
        after = " ..." if len(value) > start + width else ""
        shortened.append(f"{before}{value[start : start + width]}{after}")
    return shortened
