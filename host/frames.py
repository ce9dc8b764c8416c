"""Where the frames of a video lie among its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import families, model_call


def frame_tokens(module: Any, shape: Sequence[int], conditions: Mapping[str, Any]) -> int | None:
    """Tokens of one latent frame (of one patch in time), or None for a single image and where it cannot be told.

    Args:
        module: the diffusion model.
        shape: of what the sampler hands over, [B, C, T, H, W]; of several latents the first counts.
    """
    shape = tuple((conditions.get("latent_shapes") or [shape])[0])
    if len(shape) != 5 or shape[2] < 2:
        return None
    family, module = families.of(module), getattr(module, "_orig_mod", module)
    patch = getattr(module, "patch_size", None) if family is None else family.patch(module)
    return model_call.latent_tokens((*shape[:2], 1, *shape[3:]), patch)
