"""Noise schedules: one curve per file. Needs torch alone.

Only this room knows how alpha and sigma relate to time.
"""

from sdtrain.schedules.schedule import Schedule

__all__ = ["Schedule"]
