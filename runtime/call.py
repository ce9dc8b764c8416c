"""One attention call as ComfyUI's hook hands it over, brought to views that the kernels take, and back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AttentionCall:
    """Arguments of one call. Nothing is copied.

    Attributes:
        q, k, v: [B, H, N, D] if `packed_heads` is None, else [B, N, H*D] with that many heads.
        attn_mask: whatever mask was given.
        sm_scale: None means D ** -0.5.
        heads_out: True if the caller wants [B, H, N, D], False for [B, N, H*D].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    packed_heads: int | None
    attn_mask: Tensor | None = None
    sm_scale: float | None = None
    heads_out: bool = False

    @classmethod
    def from_hook(cls, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None,
                  skip_reshape: bool = False, skip_output_reshape: bool = False,
                  scale: float | None = None) -> AttentionCall:
        """From the arguments of ComfyUI's `optimized_attention` (names as there). SD3 gives v as [B, N, H, D]."""
        if skip_reshape:
            return cls(q, k, v, None, mask, scale, skip_output_reshape)
        return cls(_packed(q), _packed(k), _packed(v), heads, mask, scale, skip_output_reshape)

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def heads(self) -> int:
        return self.q.shape[1] if self.packed_heads is None else self.packed_heads

    @property
    def head_dim(self) -> int:
        return self.q.shape[-1] if self.packed_heads is None else self.q.shape[-1] // self.packed_heads

    @property
    def seqlen_q(self) -> int:
        return self.q.shape[-2]

    @property
    def seqlen_k(self) -> int:
        return self.k.shape[-2]

    def release(self) -> None:
        """Drop the tensors, for an attention that computes the call instead and may free them early."""
        for name in ("q", "k", "v", "attn_mask"):
            object.__setattr__(self, name, None)

    def restore(self, out: Tensor) -> Tensor:
        """The kernel's output, which has the layout of q, in the layout that the caller asked for: a view."""
        if self.packed_heads is None:
            return out if self.heads_out else out.transpose(1, 2).flatten(2)
        return out.unflatten(-1, (self.packed_heads, -1)).transpose(1, 2) if self.heads_out else out


def _packed(x: Tensor) -> Tensor:
    """[B, N, H, D] as a view [B, N, H*D], where there is one; anything else as it is."""
    return x.flatten(2) if x.dim() == 4 and x.stride(2) == x.shape[3] * x.stride(3) else x
