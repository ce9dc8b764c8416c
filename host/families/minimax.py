"""MiniMax H3: text, conditions, references and audio before the video, in one packed sequence."""

from .family import BlockPatches, Family, nothing

FAMILIES = (
    Family("MiniMax H3", ("MiniMaxH3Model",), "joint, in front", behind=nothing, numbering=BlockPatches("blocks"),
           left=("text refiner",)),
)
