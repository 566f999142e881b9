"""In which keys the runs' configurations differ."""

import json
import os
from typing import Any

from sdtrain.report.record import MeasuredRun
from sdtrain.report.section import Section, Table
from sdtrain.runs.resume import flat_leaves, is_hash


def configuration(runs: list[MeasuredRun]) -> Section:
    """A row for each key that is not the same in all; no parts where there is none."""
    runs = [run for run in runs if run.config]  # of one that has not begun nothing is known
    rows = []
    for key, values in differences(runs).items():
        if not is_hash(key):
            words = ["null" if value is None else str(value) for value in values]
            rows.append([key, *shortened(words)])
    table = Table(["key", *(run.name for run in runs)], rows)
    return Section("What differs in configuration", [table] if rows and len(runs) > 1 else [])


def differences(runs: list[MeasuredRun]) -> dict[str, list[Any]]:
    """{key: its value in each run, "" where it has no such key} for what is not the same in all."""
    leaves = [flat_leaves(run.config) for run in runs]
    keys = {}
    for each in leaves:
        keys |= dict.fromkeys(each)
    found = {}
    for key in keys:
        values = [each.get(key, "") for each in leaves]
        if len({json.dumps(value) for value in values}) > 1:
            found[key] = values
    return found


def shortened(values: list[str], width: int = 80) -> list[str]:
    """At most `width` characters of each: from a little before the place where they differ."""
    start = 0
    if max(map(len, values)) > width:
        start = max(0, len(os.path.commonprefix(values)) - 20)
    short = []
    for value in values:
        before = "... " if start else ""
        after = " ..." if len(value) > start + width else ""
        short.append(f"{before}{value[start : start + width]}{after}")
    return short
