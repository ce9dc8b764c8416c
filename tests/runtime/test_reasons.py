"""Which calls can be sparse, from shapes alone; and reasons as values."""

import pytest
import torch

from liteattention.runtime import AttentionCall, reasons
from liteattention.runtime.reasons import CROSS_ATTENTION, REASONS, UNSUPPORTED, Reason, call_reason


def call(n=256, m=None, heads=2, head_dim=64, dtype=torch.float32, **kwargs):
    q = torch.empty(1, n, heads * head_dim, dtype=dtype)
    k = torch.empty(1, m or n, heads * head_dim, dtype=dtype)
    return AttentionCall.from_hook(q, k, k, heads, **kwargs)


def test_a_plain_self_attention_can_be_sparse():
    assert call_reason(call(), 128) is None


def test_attention_to_another_sequence_stays_dense():
    assert call_reason(call(m=77), 128) == CROSS_ATTENTION


@pytest.mark.parametrize("made, text", [
    (call(mask=torch.zeros(256, 256)), "attention mask given"),
    (call(head_dim=80), "head_dim 80 not supported"),
    (call(dtype=torch.float64), "dtype torch.float64 not supported"),
])
def test_a_call_that_no_kernel_serves_is_named(made, text):
    reason = call_reason(made, 128)
    assert str(reason) == text and reason.hint == UNSUPPORTED.hint and not reason.expected
    assert len({reason, call_reason(made, 128)}) == 1, "counted as one"


@pytest.mark.parametrize("limit, n, text", [(128, 100, "fewer than 128 tokens"), (128, 128, None),
                                            (0, 1023, "fewer than 1024 tokens"), (0, 1024, None)])
def test_short_calls_stay_dense_and_the_automatic_minimum_depends_on_the_device(limit, n, text):
    reason = call_reason(call(n=n), limit)
    assert (str(reason) if reason else None) == text


def test_every_reason_is_in_the_table_and_says_what_it_means():
    assert set(REASONS) == {value for value in vars(reasons).values() if isinstance(value, Reason)}
    assert len({reason.text for reason in REASONS}) == len(REASONS)
    for reason in REASONS:
        assert reason.meaning.endswith("."), reason
        assert reason.expected == (not reason.hint), "what is normal needs no change, all else says what to try"
