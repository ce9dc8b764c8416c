"""HunyuanVideo and 1.5: text, glyphs, image embedding and reference come before the video, in one sequence with it."""

from .family import Family, nothing

FAMILIES = (
    Family("HunyuanVideo, HunyuanVideo 1.5", ("HunyuanVideo",), "joint, in front", behind=nothing,
           left=("text refiner", "text with an attention mask")),
)
