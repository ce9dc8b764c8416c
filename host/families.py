"""Model families: how many tokens of a sequence are the video's, where they lie, and who numbers the blocks.

A new family is a row of `FAMILIES`, a `Case` in tests/host/family_cases.py and a row in docs/models.md. A model without
a row has to number its blocks itself; its patch size says how many tokens the latent makes, and where a sequence is
longer by n tokens, the first n and the last n of it are must-keep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import torch

from ..runtime.reasons import CACHED_KEYS, FRAME_BY_FRAME, Reason
from ..runtime.video_tokens import VideoTokens
from . import model_call
from .block_numbers import BlockHooks, BlockPatches, ForeignForward, Numbering
from .compat import core


class ModelCall(NamedTuple):
    """One call of a diffusion model.

    Attributes:
        module: the diffusion model.
        shape: of the video's (or image's) latent, [B, C, T, H, W] or [B, C, H, W].
        context: the text conditioning, [B, L, D], or None.
        conditions: the model's other inputs by name.
        options: the call's transformer_options.
    """

    module: torch.nn.Module
    shape: tuple[int, ...]
    context: torch.Tensor | None
    conditions: Mapping[str, Any]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """Attributes:
        before, after: tokens before and after the video's: a number, a function of the call, or None if unknown. One of
            the two is enough; the rest of a sequence is at the other end. All of them are must-keep.
        patch_size: of a diffusion model: an int or (t, h, w).
        dropped: tokens of the latent that the model leaves out of its sequence.
        guides: latent frames behind the video's own.
        width: heads x head_dim of the attentions over the video, where other attentions are as long.
        heads: of the attentions over the video, or None if unknown.
        stays_dense: why all of a call's self-attention over the video stays dense, or None.
        numbering: how the blocks get their numbers; None: the model numbers them.
    """

    before: Callable[[ModelCall], int | None] | int | None = None
    after: Callable[[ModelCall], int | None] | int | None = None
    patch_size: Callable[[torch.nn.Module], object] = attrgetter("patch_size")
    dropped: Callable[[ModelCall], int] = lambda call: 0
    guides: Callable[[ModelCall], int] = lambda call: 0
    width: Callable[[torch.nn.Module], int | None] = lambda module: None
    heads: Callable[[torch.nn.Module], int | None] = lambda module: next(
        (heads for name in ("num_heads", "num_attention_heads", "n_heads")
         if isinstance(heads := getattr(module, name, None), int)), None)
    stays_dense: Callable[[Mapping[str, Any], Mapping[str, Any]], Reason | None] = lambda conditions, options: None
    numbering: Numbering | None = None


def text(call: ModelCall) -> int | None:
    """Tokens of the text. Unknown where a patch may add to them."""
    if call.context is None or "post_input" in call.options.get("patches", ()):
        return None
    return call.context.shape[1]


def wan_reference(call: ModelCall) -> int:
    """Tokens of the reference frame of Wan Fun, which comes through `ref_conv`."""
    reference = call.conditions.get("reference_latent")
    if getattr(call.module, "ref_conv", None) is None or reference is None:
        return 0
    _, patch_h, patch_w = call.module.patch_size
    return (reference.shape[-2] // patch_h) * (reference.shape[-1] // patch_w)


def scail_reference(call: ModelCall) -> int:
    """Tokens of SCAIL's reference frames."""
    return _condition_tokens(call, "reference_latent")


def scail_pose(call: ModelCall) -> int:
    """Tokens of SCAIL's pose video and of latents that are joined in time."""
    return _condition_tokens(call, "time_dim_concat", "pose_latents")


def _condition_tokens(call: ModelCall, *names: str) -> int:
    """Tokens of latents among the conditions."""
    latents = [call.conditions[name] for name in names if call.conditions.get(name) is not None]
    return sum(model_call.latent_tokens(latent.shape, call.module.patch_size) or 0 for latent in latents)


def lumina_filling(call: ModelCall) -> int:
    """Tokens by which Z-Image fills up the image to whole groups."""
    multiple = getattr(call.module, "pad_tokens_multiple", None)
    if multiple is None:
        return 0
    patch = call.module.patch_size
    height, width = (-(-size // patch) for size in call.shape[-2:])
    return -height * width % multiple


def ltx_masked_guides(call: ModelCall) -> int:
    """Tokens of guides whose mask is below 0. One read from the device per model call, where there are guides."""
    guides, mask = call.conditions.get("keyframe_idxs"), call.conditions.get("denoise_mask")
    if guides is None or mask is None or guides.shape[2] == 0:
        return 0
    frames, height, width = call.shape[2:]
    return int((mask[0] < 0).any(dim=0).expand(frames, height, width).sum())


def ltx_guides(call: ModelCall) -> int:
    """Guide frames at the end of the latent."""
    guides = call.conditions.get("keyframe_idxs")
    return 0 if guides is None else -(-guides.shape[2] // (call.shape[3] * call.shape[4]))


def ltx_width(module: torch.nn.Module) -> int:
    """The audio stream and the attentions between the streams are narrower; of equal width they cannot be told from the
    video's, and every call stays dense."""
    return module.inner_dim if getattr(module, "audio_inner_dim", None) != module.inner_dim else 0


WAN = ForeignForward("double", "blocks")
LTX = Family(before=0, patch_size=attrgetter("patchifier.patch_size"), dropped=ltx_masked_guides, guides=ltx_guides,
             width=ltx_width, numbering=BlockPatches("transformer_blocks"))
COSMOS = Family(before=0, patch_size=attrgetter("patch_temporal", "patch_spatial", "patch_spatial"),
                numbering=BlockHooks((("block", "blocks"),)))

FAMILIES: dict[str, Family] = {
    # Wan 2.1 and 2.2: references other than that of Wan Fun, and motion frames, come after the video.
    "WanModel": Family(before=wan_reference, numbering=WAN),
    "AnimateWanModel": Family(before=wan_reference, numbering=WAN),
    "VaceWanModel": Family(before=0, numbering=WAN),
    "CameraWanModel": Family(before=0, numbering=WAN),
    "WanModel_S2V": Family(before=0, numbering=WAN),
    "HumoWanModel": Family(before=0, numbering=WAN),
    "WanDancerModel": Family(before=wan_reference, numbering=WAN),
    # SCAIL: references, video, pose video.
    "SCAILWanModel": Family(before=scail_reference, after=scail_pose, numbering=WAN),
    "SCAIL2WanModel": Family(before=scail_reference, after=scail_pose, numbering=WAN),
    # Outside the steps that the pose is for, Wan Animate 2 is like any Wan.
    "WanAnimate2Model": Family(before=0, numbering=WAN, stays_dense=lambda conditions, options:
                               FRAME_BY_FRAME if conditions.get("pose_latents") is not None else None),
    "CausalWanModel": Family(before=wan_reference, numbering=WAN, stays_dense=lambda conditions, options:
                             CACHED_KEYS if options.get("ar_state") is not None else None),
    # LTXV and LTX-2: guide frames are frames of the latent.
    "LTXVModel": LTX,
    "LTXAVModel": LTX,
    # HunyuanVideo and 1.5: text, glyphs, image embedding and reference, then the video.
    "HunyuanVideo": Family(after=0),
    # MiniMax H3: text, conditions, references and audio, then the video, in one packed sequence.
    "MiniMaxH3Model": Family(after=0, heads=lambda module: module.blocks[0].attn.heads,
                             numbering=BlockPatches("blocks")),
    # CogVideoX: patches of 1.5 have two frames.
    "CogVideoXTransformer3DModel": Family(
        after=0, patch_size=lambda module: (module.patch_size_t or 1, module.patch_size, module.patch_size),
        numbering=BlockHooks((("double", "blocks"),))),
    # Mochi: the text is cropped to its longest prompt.
    "AsymmDiTJoint": Family(before=0, numbering=BlockPatches("blocks")),
    # Cosmos 1, Cosmos Predict2 and Anima: Predict2 numbers its blocks from ComfyUI 0.33 on.
    "GeneralDIT": COSMOS,
    "MiniTrainDIT": COSMOS,
    "Anima": COSMOS,
    # Kandinsky 5: blocks of the text alone run first, without a number.
    "Kandinsky5": Family(before=0),
    # Flux, Flux 2, Chroma, Qwen-Image, Mage-Flow and Krea 2: text, image, images to edit.
    "Flux": Family(before=text),
    "Chroma": Family(before=text),
    "ChromaRadiance": Family(before=text),
    "QwenImageTransformer2DModel": Family(before=text),
    "MageFlowTransformer2DModel": Family(before=text),
    "SingleStreamDiT": Family(before=text, patch_size=attrgetter("patch"), heads=attrgetter("heads")),
    # JoyImage: image, images to edit, text.
    "JoyImageTransformer3DModel": Family(before=0),
    # PixelDiT: text, image.
    "PixDiT_T2I": Family(after=0, heads=attrgetter("num_groups"), numbering=BlockHooks((("double", "patch_blocks"),))),
    # SD3.5 medium has a second self-attention, of the image alone, in some blocks.
    "OpenAISignatureMMDITWrapper": Family(after=0, numbering=BlockHooks((("joint", "joint_blocks"),))),
    # HiDream-I1: how much text comes after the image depends on the block.
    "HiDreamImageTransformer2DModel": Family(
        before=0, numbering=BlockHooks((("double", "double_stream_blocks"), ("single", "single_stream_blocks")))),
    # Lumina 2 and Z-Image: text, references, image, filling.
    "NextDiT": Family(after=lumina_filling),
    "NextDiTPixelSpace": Family(after=lumina_filling),
}
"""By the class name of the diffusion model."""


UNET_NOTE = ("this model is not served: a UNet (SD 1.5, SDXL, SVD, AnimateDiff) attends frame by frame and at several "
             "sizes; bypass the node")


def not_served(module: torch.nn.Module | None) -> str:
    """Why no attention of a diffusion model can be sparse, and what to do; "" where some may be."""
    unet = core("comfy.ldm.modules.diffusionmodules.openaimodel:UNetModel")
    return UNET_NOTE if unet is not None and isinstance(_uncompiled(module), unet) else ""


def of(module: torch.nn.Module | None) -> Family | None:
    """The family of a diffusion model, or None."""
    return FAMILIES.get(type(_uncompiled(module)).__name__)


def video_tokens(module: torch.nn.Module | None, shape: tuple[int, ...], context: torch.Tensor | None,
                 conditions: Mapping[str, Any], options: Mapping[str, Any]) -> VideoTokens | int | None:
    """The video's tokens in a call of `module`, or None if they cannot be counted.

    Args:
        shape: of the sampler's latent; several latents come as one, with `latent_shapes` among the conditions.
        context: the text conditioning, [B, L, D].
    """
    shapes = conditions.get("latent_shapes") or [shape]
    family, module = of(module), _uncompiled(module)
    if family is None:
        return model_call.latent_tokens(shape, getattr(module, "patch_size", None), len(shapes))
    call = ModelCall(module, tuple(shapes[0]), context, conditions, options)
    patch = family.patch_size(module)
    count, grid = model_call.latent_tokens(call.shape, patch), model_call.latent_grid(call.shape, patch)
    if count is None or grid is None:
        return None
    before, after = (end(call) if callable(end) else end for end in (family.before, family.after))
    own = (grid[0] - family.guides(call), *grid[1:])
    return VideoTokens(count - family.dropped(call), before, after, family.width(module), family.heads(module), own)


def stays_dense(module: torch.nn.Module | None, conditions: Mapping[str, Any],
                options: Mapping[str, Any]) -> Reason | None:
    """Why all self-attention over the video in a call of `module` stays dense, or None."""
    family = of(module)
    return None if family is None else family.stays_dense(conditions, options)


@contextmanager
def numbered(module: torch.nn.Module | None, options: dict) -> Iterator[dict]:
    """`options` for one call of `module`, whose blocks have numbers while the context is open."""
    family = of(module)
    if family is None or family.numbering is None:
        yield options
        return
    with family.numbering.numbered(_uncompiled(module), options) as counted:
        yield counted


def _uncompiled(module: torch.nn.Module | None) -> torch.nn.Module | None:
    """torch.compile puts a module of its own around a model."""
    return getattr(module, "_orig_mod", module)
