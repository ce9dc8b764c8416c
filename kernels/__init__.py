"""Skip-mask attention: tensors in, tensors out. Imports torch only; Triton at the first call that uses it."""

from .api import CRITERIA, DTYPES, HEAD_DIMS, call_tiles, lite_attention, unsupported_call
from .backend import BACKENDS, BackendChoice, choose_backend, resolve_backend
from .errors import UnsupportedAttention
from .launch_table import break_even_density
from .mask import TILE, MustKeep, SkipMask, mask_nbytes, mask_shape, tiles
from .precision import PRECISIONS, PrecisionChoice, precision_choice
from .triton_probe import triton_package
from .workspace import Workspace

__all__ = [
    "BACKENDS", "CRITERIA", "DTYPES", "HEAD_DIMS", "PRECISIONS", "TILE", "BackendChoice", "MustKeep", "PrecisionChoice",
    "SkipMask", "UnsupportedAttention", "Workspace", "break_even_density", "call_tiles", "choose_backend",
    "lite_attention", "mask_nbytes", "mask_shape", "precision_choice", "resolve_backend", "tiles", "triton_package",
    "unsupported_call",
]
