"""Wan 2.1 and 2.2. References of Wan Fun come first, those of others, and motion frames, last."""

from .family import Family, ForeignForward, ModelCall, nothing

CROSS = "cross-attention"
FOREIGN = ForeignForward("double", "blocks")


def reference_frame(call: ModelCall) -> int:
    """Tokens of the reference through `ref_conv`."""
    reference = call.conditions.get("reference_latent")
    if getattr(call.module, "ref_conv", None) is None or reference is None:
        return 0
    _, patch_h, patch_w = call.module.patch_size
    return (reference.shape[-2] // patch_h) * (reference.shape[-1] // patch_w)


FAMILIES = (
    Family("Wan 2.1 / 2.2 T2V, I2V", ("WanModel",), CROSS, front=reference_frame, numbering=FOREIGN),
    Family("Wan VACE", ("VaceWanModel",), CROSS, front=nothing, numbering=FOREIGN),
    Family("Wan Camera", ("CameraWanModel",), CROSS, front=nothing, numbering=FOREIGN),
    Family("Wan S2V", ("WanModel_S2V",), CROSS, front=nothing, left=("audio",), numbering=FOREIGN),
    Family("Wan Animate", ("AnimateWanModel",), CROSS, front=reference_frame, left=("face",),
           numbering=FOREIGN),
)
