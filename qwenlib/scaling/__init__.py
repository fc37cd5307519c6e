"""Scaling laws (report §3.2): forms, robust fits with intervals, public runs, our own sweep."""

from qwenlib.scaling.forms import LossLaw, PowerLaw

__all__ = ["LossLaw", "PowerLaw"]
