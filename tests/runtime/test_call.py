"""The layouts of ComfyUI's calls, and back."""

import pytest
import torch

from liteattention.runtime import AttentionCall


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("heads_out", [True, False])
def test_results_return_as_views_in_the_layout_asked_for(packed, heads_out):
    n, heads, d = 130, 3, 64
    x = torch.randn(2, n, heads * d)
    split = x.unflatten(-1, (heads, d)).transpose(1, 2)
    q = x if packed else split
    made = AttentionCall.from_hook(q, q, q, heads, skip_reshape=not packed, skip_output_reshape=heads_out)
    assert (made.batch, made.heads, made.head_dim, made.seqlen_q, made.seqlen_k) == (2, heads, d, n, n)
    back = made.restore(q)
    assert torch.equal(back, split if heads_out else x)
    assert back.data_ptr() == x.data_ptr(), "no copy"


def test_a_packed_call_may_hold_one_tensor_with_its_heads_apart():
    x = torch.randn(1, 130, 3 * 64)
    made = AttentionCall.from_hook(x, x, x.unflatten(-1, (3, 64)), 3)
    assert torch.equal(made.v, x) and made.v.data_ptr() == x.data_ptr()


def test_a_released_call_holds_no_tensor():
    x = torch.randn(1, 130, 64)
    made = AttentionCall.from_hook(x, x, x, 1, mask=x)
    made.release()
    assert (made.q, made.k, made.v, made.attn_mask) == (None,) * 4
