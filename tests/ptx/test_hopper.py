"""The kernel for Hopper, executed: in any order of its warps the same, and what is wrong with its barriers is seen."""

import re

import pytest
from executed_ptx import Case, gate, run_case
from support.executor import as_on, executor, missing

from liteattention import kernels
from liteattention.kernels import SkipMask, selftest

KERNEL = "hopper_attention_kernel"
CASES = [case for case in gate("sm_90") if case.hopper and case.layout != "unaligned"]
ORDERS = [{"order": 0}, {"order": 1}, *({"order": 2, "shuffle": True, "seed": seed} for seed in (1, 2))]
SMALL = Case("small", 64, n_q=200, n_k=700, pooled=False, steps=("record",), hopper=True)
"""Six tiles: every buffer is used three times."""

WAIT = (r"\{\s*\.reg \.pred complete;\s*(?:@!%p\d+ bra\.uni skip;\s*)?waitLoop:\s*"
        r"mbarrier\.try_wait\.parity\.shared\.b64 complete, \[%r\d+\], (%r\d+);\s*@!complete bra\.uni waitLoop;\s*"
        r"(?:skip:\s*)?\}")


@pytest.fixture(autouse=True)
def here():
    if why := missing():
        pytest.skip(why)


@pytest.mark.parametrize("order", ORDERS[1:], ids=lambda order: " ".join(map(str, order.values())))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_in_any_order_of_warps(case, order):
    assert run_case(case, "sm_90", **order).faults == []


def test_a_small_call_is_right():
    assert [run_case(SMALL, "sm_90", **order).faults for order in ORDERS] == [[]] * len(ORDERS)


@pytest.mark.parametrize("mutate, problem", [
    (None, None),
    (lambda name, ptx: re.sub(r"@%p\d+ st\.global\.b8[^;]*;", "", ptx), "differs")], ids=["right", "wrong"])
def test_its_self_test(monkeypatch, mutate, problem):
    """As on the user's GPU; and with flags that are not stored."""
    with executor()("sm_90", mutate=mutate) as gpu, as_on("sm_90"):
        full = SkipMask.full

        def noted(*args, **options):
            mask = full(*args, **options)
            gpu.masks.append(("mask", mask.words[0]))
            return mask

        monkeypatch.setattr(SkipMask, "full", noted)
        forms = selftest.checked_forms(kernels, "cuda:0", plain=False, hopper=True)
        assert {form.head_dim for form in forms} == {64, 128} and not any(form.int8 for form in forms)
        found = selftest.check(kernels, "cpu", forms if mutate is None else forms[:1], hopper=True)
    assert found is None if problem is None else problem in found


def _sites(pattern: str) -> list[re.Match]:
    """Where the kernel's PTX matches."""
    found: list[re.Match] = []
    run_case(SMALL, "sm_90", mutate=lambda name, ptx: (found.extend(re.finditer(pattern, ptx, re.DOTALL))
                                                       if name == KERNEL else None, ptx)[1])
    assert found, pattern
    return found


def _said(site: re.Match, replacement: str) -> str:
    """All faults with this site replaced, over the orders."""
    def planted(name, ptx):
        return ptx[:site.start()] + replacement + ptx[site.end():] if name == KERNEL else ptx

    return " ".join(" ".join(run_case(SMALL, "sm_90", mutate=planted, **order).faults) for order in ORDERS[:3])


@pytest.mark.parametrize("pattern, said", [
    (r"@%p\d+ mbarrier\.arrive\.shared::cta\.b64 _, \[%r\d+\];", "DEADLOCK"),
    (r"@%p\d+ mbarrier\.arrive\.expect_tx\S* _, \[%r\d+\], \d+;", "DEADLOCK"),
    (r"wgmma\.wait_group\.sync\.aligned \d;", "RACE|RESULT"),
    (r"fence\.proxy\.async\.shared::cta;", "PROXY"),
], ids=["arrival", "copy announced", "product awaited", "fence"])
def test_what_is_left_out_is_missed(pattern, said):
    for site in _sites(pattern):
        assert re.search(said, _said(site, "")), f"{site[0]} at {site.start()}"


def test_a_wait_left_out_is_a_race():
    """But for the producer's first: nobody has used that buffer."""
    silent = [site.start() for site in _sites(WAIT) if "RACE" not in _said(site, "")]
    assert len(silent) <= 1, silent


def test_a_wait_for_the_other_phase_is_seen():
    for site in _sites(WAIT):
        other = site[0].replace(".pred complete;", f".pred complete; .reg .b32 %other; xor.b32 %other, {site[1]}, 1;")
        assert re.search("RACE|DEADLOCK", _said(site, other.replace(f"], {site[1]};", "], %other;"))), site.start()


def test_a_buffer_released_while_it_is_read_is_a_race():
    """The wait for a product moved behind the arrival that follows it."""
    release = (r"(wgmma\.wait_group\.sync\.aligned \d;)"
               r"((?:(?!wgmma)[^{])*?mbarrier\.arrive\.shared::cta\.b64 _, \[%r\d+\];)")
    for site in _sites(release):
        assert "RACE" in _said(site, site[2] + site[1]), f"{site[0]} at {site.start()}"


def test_warps_of_one_group_stay_together_where_they_share_an_arrival():
    """One thread arrives for four warps: the named barrier before it is what the other three are waited for by."""
    together = r"bar\.sync\s+\d, 128;((?:(?!bar\.sync|wgmma)[^{])*?mbarrier\.arrive\.shared::cta)"
    for site in _sites(together):
        assert "RACE" in _said(site, site[1]), f"{site[0]} at {site.start()}"


def test_registers_that_nobody_gives_back_are_never_there():
    taken = _sites(r"setmaxnreg\.dec\.sync\.aligned\.u32\s+120;")[0]
    assert "DEADLOCK" in _said(taken, "")
