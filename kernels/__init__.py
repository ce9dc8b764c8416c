"""Skip-mask attention: tensors in, tensors out. Imports torch only; Triton at the first call that uses it."""

from .api import DTYPES, HEAD_DIMS, call_tiles, lite_attention, unsupported_call
from .backends import BACKENDS, BackendChoice, choose_backend, resolve_backend
from .errors import UnsupportedAttention
from .mask import TILE, MustKeep, SkipMask, mask_nbytes, mask_shape, tiles
from .workspace import Workspace

__all__ = [
    "BACKENDS", "DTYPES", "HEAD_DIMS", "TILE", "MustKeep", "SkipMask", "UnsupportedAttention", "Workspace",
    "BackendChoice", "call_tiles", "choose_backend", "lite_attention", "mask_nbytes", "mask_shape", "resolve_backend",
    "tiles", "unsupported_call",
]
