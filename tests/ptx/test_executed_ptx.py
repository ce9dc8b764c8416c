"""What the compiler makes of the kernels, executed: the cases that a change of kernels or launches has to pass."""

import re

import pytest
from executed_ptx import ARCHS, Case, gate, run_case
from support.executor import missing

INFORMATIONAL = ("sm_90",)
"""Of these the executor knows less: its wgmma, TMA and barriers in memory follow the manual and no hardware."""
CASES = [pytest.param(arch, case, id=f"{arch} {case.name}") for arch in ARCHS for case in gate(arch)]
SMALL = Case("small", 64, n_q=200, steps=("record",))


def faults(*args, **options):
    if why := missing():
        pytest.skip(why)
    return run_case(*args, **options).faults


@pytest.mark.parametrize("arch, case", CASES)
def test_compiled_code_gives_what_the_rule_says(arch, case):
    found = faults(case, arch)
    if found and arch in INFORMATIONAL:
        pytest.xfail("; ".join(found)[:1000])
    assert not found, "\n".join(found)


def test_another_order_of_programs_and_warps_changes_nothing():
    assert faults(SMALL, "sm_89", order=2, shuffle=True) == []


@pytest.mark.parametrize("kernel, pattern, replacement, said", [
    # Rows stored past the end, no barriers, copies read before they are there, every weight 1, every tile kept.
    ("attention_kernel", r"@%p\d+ (st\.global)", r"\1", "OUT-OF-BOUNDS"),
    ("pool_kernel", r"bar\.sync\s+0;", "", "RACE"),
    ("attention_kernel", r"cp\.async\.wait_group\s+\d+;", "", "ASYNC-RACE|UNINITIALISED"),
    ("attention_kernel", r"(ex2\.approx\.ftz\.f32\s+%r\d+), %r\d+;", r"\1, 0f00000000;", "RESULT: error"),
    ("attention_kernel", r"(atom\.global\S*\.or\.b32 %r\d+, \[[^]]*\]), %r\d+;", r"\1, -1;", "decisions"),
], ids=["store", "barrier", "copy", "weight", "mask"])
def test_a_planted_fault_is_seen(kernel, pattern, replacement, said):
    def planted(name, ptx):
        changed, n = re.subn(pattern, replacement, ptx)
        assert name != kernel or n, pattern
        return changed if name == kernel else ptx

    assert faults(SMALL, "sm_89") == []
    assert re.search(said, " ".join(faults(SMALL, "sm_89", mutate=planted)))
