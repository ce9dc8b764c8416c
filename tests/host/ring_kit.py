"""Stands for xFuser's ring module with one GPU: the same names, PyTorch's attention."""

import torch


def select_flash_attn_impl(impl_type, stage="fwd-bwd", attn_processor=None):
    return local


def local(q, k, v, *, softmax_scale=None, causal=False, **others):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=softmax_scale, is_causal=causal)
    return out.transpose(1, 2), torch.zeros(q.shape[:3])


def xdit_ring_flash_attn_forward(q, k, v):
    return select_flash_attn_impl("TORCH", stage="fwd-only", attn_processor=None)(q, k, v, causal=False, dropout_p=0.0)


def attention(q, k, v, heads, mask=None, transformer_options=None, **others):
    """In the place of a model's `optimized_attention`, q, k, v [B, N, H*D]."""
    tensors = (x if isinstance(x, torch.Tensor) else x.take() for x in (q, k, v))
    return xdit_ring_flash_attn_forward(*(x.unflatten(-1, (heads, -1)) for x in tensors))[0].flatten(2)
