"""LTXV and LTX-2. Guide frames are frames of the latent; masked ones are not among the tokens."""

from operator import attrgetter

import torch

from .family import BlockPatches, Family, ModelCall, nothing


def masked_guides(call: ModelCall) -> int:
    """Tokens of guides whose mask is below 0. One read from the device per model call, where there are guides."""
    guides, mask = call.conditions.get("keyframe_idxs"), call.conditions.get("denoise_mask")
    if guides is None or mask is None or guides.shape[2] == 0:
        return 0
    frames, height, width = call.shape[2:]
    return int((mask[0] < 0).any(dim=0).expand(frames, height, width).sum())


def video_width(module: torch.nn.Module) -> int:
    """The audio stream and the attentions between the streams are narrower; where they are not, no call is taken."""
    return module.inner_dim if getattr(module, "audio_inner_dim", None) != module.inner_dim else 0


FAMILIES = tuple(
    Family(name, (model,), "cross-attention", front=nothing, patch=attrgetter("patchifier.patch_size"),
           dropped=masked_guides, numbering=BlockPatches("transformer_blocks"), width=video_width, left=left)
    for name, model, left in (
        ("LTXV", "LTXVModel", ("guides with a strength",)),
        ("LTX-2", "LTXAVModel", ("guides with a strength", "audio", "audio to video and back")),
    ))
