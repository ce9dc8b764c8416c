"""SD3 and 3.5: text first. 3.5 medium has a second self-attention of the image alone in some blocks."""

from .family import BlockHooks, Family, nothing

FAMILIES = (
    Family("SD3, SD3.5", ("OpenAISignatureMMDITWrapper",), "joint, in front", behind=nothing,
           numbering=BlockHooks((("joint", "joint_blocks"),))),
)
