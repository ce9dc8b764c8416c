"""LiteAttention in the workers of Raylight, which runs one model on several GPUs.

`actors` runs in ComfyUI and speaks to the workers; `bootstrap` makes the pack importable in one; there `worker` patches
the model, and `doors` takes the attention over.
"""

from .actors import apply, last_run

__all__ = ["apply", "last_run"]
