"""Qwen-Image: text first, images to edit last."""

from .family import Family, text

FAMILIES = (
    Family("Qwen-Image", ("QwenImageTransformer2DModel",), "joint, in front", front=text,
           left=("text with an attention mask",)),
)
