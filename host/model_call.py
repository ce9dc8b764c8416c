"""What ComfyUI tells about one model call: layer, conditioning rows, video tokens, window, kind of pass."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping

from ..runtime import LayerId, RowName
from ..runtime.reasons import EXTRA_PASS, MOVING_WINDOWS, Reason

STATIC_SCHEDULES = ("standard_static", "batched")
"""Context schedules whose windows cover the same frames at every step."""

_PASS_FLAGS = ("stg_self_attn_blocks", "a2v_cross_attn", "v2a_cross_attn")
"""Set per call by guiders in passes with a changed network."""


def layer_id(options: Mapping) -> LayerId | None:
    """The block that calls, or None if the model does not say."""
    index = options.get("block_index")
    if not isinstance(index, int):
        return None
    total = options.get("total_blocks")
    return LayerId(str(options.get("block_type", "block")), index, total if isinstance(total, int) else None)


def row_names(options: Mapping, batch: int) -> list[Hashable] | None:
    """A stable name for each batch entry: (uuid of its conditioning, number of the conditioning in the guider's list,
    row in its chunk).

    The position in the batch means something else from call to call: the order is reversed, and rows are joined or
    split by free memory. The uuid alone is not enough: for a regional prompt ComfyUI adds a copy of it, uuid and all,
    to the other conditionings. The number alone is not either: several entries share it, and entries come and go.
    """
    uuids, numbers = options.get("uuids"), options.get("cond_or_uncond")
    if not uuids or not numbers or len(uuids) != len(numbers) or batch % len(uuids):
        return None
    per_chunk = batch // len(uuids)
    return [RowName(uuid, number, row) for uuid, number in zip(uuids, numbers, strict=True) for row in range(per_chunk)]


def latent_grid(shape: tuple[int, ...], patch_size: object, modalities: int = 1) -> tuple[int, int, int] | None:
    """(frames, rows, columns) of a latent's tokens, or None if that cannot be told.

    Args:
        shape: [B, C, T, H, W] or [B, C, H, W].
        patch_size: an int or (t, h, w).
        modalities: latents that the sampler has in one.
    """
    if isinstance(patch_size, int):
        patch = (1, patch_size, patch_size)
    elif isinstance(patch_size, (tuple, list)) and all(isinstance(p, int) for p in patch_size):
        patch = (1, *patch_size) if len(patch_size) == 2 else tuple(patch_size)
    else:
        return None
    sizes = tuple(shape[2:])
    if len(sizes) == 2:
        sizes = (1, *sizes)
    if modalities != 1 or len(sizes) != 3 or len(patch) != 3 or min(patch) < 1:
        return None
    frames, rows, columns = (-(-size // p) for size, p in zip(sizes, patch, strict=True))
    return frames, rows, columns


def latent_tokens(shape: tuple[int, ...], patch_size: object, modalities: int = 1) -> int | None:
    """Tokens that a latent makes, or None if that cannot be told. Arguments: see `latent_grid`."""
    grid = latent_grid(shape, patch_size, modalities)
    return None if grid is None else math.prod(grid)


def window_key(options: Mapping) -> Hashable:
    """Frames of the context window, or None outside one. The window object itself is new at every step."""
    window = options.get("context_window")
    if window is None:
        return None
    return tuple(window.index_list), getattr(window, "causal_anchor_index", None)


def windows_move(model_options: Mapping) -> bool:
    """Whether context windows cover other frames at every step, so that no mask can be carried over."""
    handler = model_options.get("context_handler")
    if handler is None:
        return False
    return getattr(getattr(handler, "context_schedule", None), "name", None) not in STATIC_SCHEDULES


def pass_fingerprint(options: Mapping) -> Hashable:
    """What tells a guider's extra pass (skipped layers, perturbed attention) from the run's ordinary ones."""
    replaced = options.get("patches_replace") or {}
    patches = frozenset((kind, str(name)) for kind, entries in replaced.items() for name in entries)
    return patches, tuple(flag for flag in _PASS_FLAGS if flag in options)


def dense_reason(options: Mapping, ordinary: Collection[Hashable], moving_windows: bool) -> Reason | None:
    """Why a whole pass stays dense, or None.

    Args:
        ordinary: fingerprints of ordinary passes.
    """
    if pass_fingerprint(options) not in ordinary:
        return EXTRA_PASS
    return MOVING_WINDOWS if moving_windows else None
