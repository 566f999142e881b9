"""Noise schedules: one curve per file. Only this room knows how alpha and sigma relate to time."""

from sdtrain.schedules.cosine import cosine
from sdtrain.schedules.linear import linear
from sdtrain.schedules.scaled_linear import scaled_linear
from sdtrain.schedules.schedule import Schedule, TableSchedule

__all__ = ["Schedule", "TableSchedule", "cosine", "linear", "scaled_linear"]
