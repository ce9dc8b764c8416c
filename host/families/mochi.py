"""Mochi: text behind the video, cropped to its longest prompt."""

from .family import BlockPatches, Family, nothing

FAMILIES = (
    Family("Mochi", ("AsymmDiTJoint",), "joint, behind", front=nothing, numbering=BlockPatches("blocks")),
)
