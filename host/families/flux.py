"""Flux: text first, references of Kontext last."""

from .family import Family, text

FAMILIES = (
    Family("Flux", ("Flux",), "joint, in front", front=text),
)
