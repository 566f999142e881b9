"""Noise schedules, one curve per file. Needs torch only.

No other room computes alpha and sigma from a time.
"""

from sdtrain.schedules.schedule import Schedule

__all__ = ["Schedule"]
