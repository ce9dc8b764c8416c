"""HiDream-I1: the image first, then text; how much of it depends on the block."""

from .family import BlockHooks, Family, nothing

FAMILIES = (
    Family("HiDream-I1", ("HiDreamImageTransformer2DModel",), "joint, behind", front=nothing,
           numbering=BlockHooks((("double", "double_stream_blocks"), ("single", "single_stream_blocks")))),
)
