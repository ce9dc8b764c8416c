"""The check before the clock: right outputs pass, planted faults do not."""

import pytest
import torch
from support.contenders import Contender, Problem, contenders, flex_block_mask
from support.masks import realistic_bits
from support.reference import Reference, sampled_heads, sampled_rows

from liteattention.kernels import lite_attention

N, HEADS = 1000, 3
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def problem():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, N, HEADS, 64).transpose(1, 2) for _ in range(3))
    return Problem(q, k, v, realistic_bits(HEADS, N, 0.5))


def dense(p):
    return torch.nn.functional.scaled_dot_product_attention(p.q, p.k, p.v)


def masked(p, bits):
    keep = bits.repeat_interleave(128, 2).repeat_interleave(128, 3)[..., :N, :N]
    return torch.nn.functional.scaled_dot_product_attention(p.q, p.k, p.v, attn_mask=keep)


def test_right_outputs_pass(problem):
    assert Reference(problem.q, problem.k, problem.v).check(dense(problem), 1e-5).passed
    reference = Reference(problem.q, problem.k, problem.v, problem.bits)
    assert reference.check(masked(problem, problem.bits), 1e-5).passed
    mask = problem.mask("a test")
    assert reference.check(lite_attention(problem.q, problem.k, problem.v, mask, record=False), 1e-5).passed


def missing_tile(p):
    bits = p.bits.clone()
    bits[0, 0, 3, bits[0, 0, 3].nonzero()[0]] = False
    return masked(p, bits)


def wrong_row(p):
    out = masked(p, p.bits)
    out[0, HEADS - 1, N - 1] *= 1.5  # in the last, ragged query tile
    return out


def unwritten_row(p):
    out = masked(p, p.bits)
    out[0, 0, 0] = torch.nan
    return out


@pytest.mark.parametrize("fault", [missing_tile, wrong_row, unwritten_row, dense], ids=lambda f: f.__name__)
def test_planted_faults_are_caught_also_at_the_tolerance_of_int8(problem, fault):
    result = Reference(problem.q, problem.k, problem.v, problem.bits).check(fault(problem), 5e-2)
    assert not result.passed, result


def test_rows_of_the_first_and_the_last_tile_are_looked_at():
    rows = sampled_rows(N)
    assert {0, 127, 896, N - 1} <= set(rows) and max(rows) < N
    assert sampled_heads(40)[0] == 0 and sampled_heads(40)[-1] == 39 and sampled_heads(1) == [0]


def test_a_contender_with_a_wrong_output_gets_no_time(script, problem):
    attention = script("attention")
    wrong = Contender("wrong", "dense", "full", lambda p: lambda: dense(p) * 1.1)
    broken = Contender("broken", "dense", "full", lambda p: lambda: dense(p).view(1, 2))
    right = Contender("sdpa", "dense", "full", lambda p: lambda: dense(p))
    rows = attention.measure(attention.Group(64, "float32", 512, 2, 0.5), [right, wrong, broken], CPU, 0.01,
                             float("inf"), 0)
    rows = {row["contender"]: row for row in rows}
    assert rows["sdpa"]["median_ms"] > 0 and "problem" not in rows["sdpa"]
    assert "median_ms" not in rows["wrong"] and rows["wrong"]["problem"].startswith("wrong output: relative L2 0.1")
    assert "median_ms" not in rows["broken"] and rows["broken"]["problem"].startswith("RuntimeError: ")


def test_a_recorder_that_drops_tiles_gets_no_time(script, monkeypatch):
    attention = script("attention")
    monkeypatch.setattr("support.contenders.NEVER_DROPS", 0.0)
    present, _ = contenders(CPU, 64, torch.float32)
    record = [c for c in present if c.name == "record full"]
    row, = attention.measure(attention.Group(64, "float32", 1024, 2, 0.5), record, CPU, 0.01, float("inf"), 0)
    assert row["problem"] == "tiles were dropped while it was timed" and "median_ms" not in row


def test_absent_contenders_say_why():
    present, absent = contenders(CPU, 64, torch.float32)
    assert [c.name for c in present] == ["sdpa", "unskipped full", "read full", "record full", "default full"]
    assert set(absent) == {"sdpa cudnn", "sdpa flash", "flex", "sage", "kitchen int8", "kitchen sol",
                           *(f"{form} {precision}" for form in ("unskipped", "read", "record", "default")
                             for precision in ("int8", "hopper"))}
    assert all(len(reason) > 10 for reason in absent.values())
    assert absent["default int8"].startswith("INT8 needs the Triton backend")


def test_flex_gets_the_same_blocks():
    bits = realistic_bits(2, N, 0.5)
    assert flex_block_mask(bits, N).to_dense().bool().equal(bits)
