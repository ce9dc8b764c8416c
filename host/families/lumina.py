"""Lumina 2 and Z-Image: text and references first; Z-Image fills the image up to whole groups of tokens behind it."""

from .family import Family, ModelCall


def padding(call: ModelCall) -> int:
    """Tokens that fill up the image."""
    multiple = getattr(call.module, "pad_tokens_multiple", None)
    if multiple is None:
        return 0
    patch = call.module.patch_size
    height, width = (-(-size // patch) for size in call.shape[-2:])
    return -height * width % multiple


FAMILIES = (
    Family("Lumina 2, Z-Image", ("NextDiT",), "joint, in front", behind=padding,
           left=("text refiner", "image refiner")),
)
