"""Noise schedules: one curve per file. Only this room knows how alpha and sigma relate to time. Needs torch alone."""

from sdtrain.schedules.schedule import Schedule

__all__ = ["Schedule"]
