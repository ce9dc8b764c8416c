"""The shipped launch table, compiled for GPUs that are not here, against the pinned figures; and that this can fail."""

import json
import os
import subprocess
import sys

import pytest
from support import pins
from support.compiling import compile_all
from support.variants import (
    AMD,
    HOPPER,
    KERNELS,
    NVIDIA,
    SHARED_LIMIT,
    all_variants,
    amd_gate_variants,
    default_variants,
    gate_variants,
    variants,
)

from liteattention.kernels import forms, selftest

DEFAULT, *_ = default_variants("sm_80")
"""The attention kernel of the form that the defaults launch for the usual call."""
OTHER = next(variant for variant in variants("sm_80") if variant not in default_variants("sm_80"))
ROW = {"launch": "128x64 w8 s2 registers", "spill": 0, "atomics": 3, "tensor": "128 HMMA.16816.F32.BF16", "notes": "",
       "copies": 8, "loop": 500, "registers": 240, "shared": 65536, "instructions": 1500}


def checked(row, triton="3.6.0", variant=DEFAULT, pinned=ROW, names=None):
    held = {"triton": "3.6.0", "variants": {variant.name: pinned}}
    return pins.check({variant: row}, [variant.name] if names is None else names, held, triton)


def test_the_shipped_table_compiles_to_what_is_pinned(static):
    wrong = static.gate()
    assert not wrong, "\n".join(wrong)


def test_pins_gate_and_self_test_hold_what_is_launched_and_nothing_else(static):
    """All three are made from `forms`: the defaults of every architecture with each single deviation are pinned, the
    defaults of each and the deviations on one GPU of each kind are compiled at every push, and a user's GPU checks its
    own defaults and deviations."""
    assert set(static.names()) == set(pins.load()["variants"])
    for arch in NVIDIA:
        attention = [variant.form for variant in variants(arch) if variant.kernel == "attention"]
        assert len(attention) == len(set(attention)) and set(attention) == set(forms.near_defaults(arch))
        assert {v.form for v in all_variants(arch)} == set(forms.launchable(arch))
        assert set(default_variants(arch)) <= set(gate_variants()) & set(variants(arch))
        assert {v.form for v in default_variants(arch)} == set(forms.default_forms(arch))
        assert {v.kernel for v in variants(arch)} >= set(KERNELS) - {"channel sum", "balance", "quantize"}
    assert set(gate_variants()) < {variant for arch in NVIDIA for variant in variants(arch)}
    assert {v.kernel for v in gate_variants()} == {*KERNELS, *HOPPER}


def test_the_table_knows_the_nodes_defaults_and_everything_that_is_served():
    from liteattention.kernels import CRITERIA, DTYPES, HEAD_DIMS, PRECISIONS
    from liteattention.runtime.config import LiteAttentionConfig

    config = LiteAttentionConfig()
    first = {name: values[0] for name, values in forms.CHOICES.items()}
    assert first["criterion"] == config.rule.skip_test(None, 0, 1024).criterion
    assert (first["precision"], first["pool_skipped"]) == (config.precision, config.pool_skipped)
    served = {"criterion": CRITERIA, "precision": PRECISIONS, "head_dim": HEAD_DIMS, "dtype": DTYPES}
    assert {name: set(values) for name, values in served.items()} == {name: set(forms.CHOICES[name]) for name in served}


def test_the_self_test_of_a_gpu_checks_the_pinned_forms(monkeypatch):
    from liteattention import kernels
    from liteattention.kernels import launch_table

    for arch in NVIDIA:
        monkeypatch.setattr(launch_table, "architecture", lambda device, arch=arch: arch)
        assert selftest.checked_forms(kernels, "cuda:0", plain=False) == forms.near_defaults(arch)
        plain = selftest.checked_forms(kernels, "cuda:0", plain=True)
        assert not any(form.pool_skipped for form in plain) and len(plain) == len(set(plain))


def test_amd_compiles(static):
    if "amd" not in pytest.importorskip("triton.backends").backends:
        pytest.skip("this Triton has no compiler for AMD")
    rows = compile_all(static.__file__, amd_gate_variants())
    assert {variant.arch for variant in rows} == set(AMD)
    assert {variant.name: row["problem"] for variant, row in rows.items() if "problem" in row} == {}
    assert [variant.name for variant, row in rows.items() if not row["kernel_tensor"]] == []
    assert [variant.name for variant, row in rows.items() if variant.kernel == "pool" and row["spill"]] == []
    assert [variant.name for variant, row in rows.items() if row["shared"] > 1024 * SHARED_LIMIT[variant.arch]] == []


def test_the_readme_counts_the_variants():
    readme = (pins.PINS.parent / "README.md").read_text(encoding="utf-8")
    assert f"Compiles {len(pins.load()['variants'])} variants" in readme
    assert f"compiles {len(gate_variants())} of the variants" in readme


def test_what_is_pinned_passes():
    assert checked(ROW) == []
    assert checked({**ROW, "loop": 510, "registers": 248}) == []
    assert checked({**ROW, "loop": 300, "registers": 128, "shared": 100}) == []


@pytest.mark.parametrize("figure, value, said", [
    ("loop", 511, "loop was 500, is 511 (at most 510)"),
    ("registers", 249, "registers was 240, is 249 (at most 248)"),
    ("shared", 65552, "shared was 65536, is 65552 (at most 65536)"),
    ("copies", 4, "copies was 8, is 4"),
    ("copies", 9, "copies was 8, is 9"),
    ("tensor", "64 HMMA.16816.F32.BF16", "tensor was 128 HMMA.16816.F32.BF16, is 64 HMMA.16816.F32.BF16"),
    ("launch", "64x64 w4 s2", "launch was 128x64 w8 s2 registers, is 64x64 w4 s2"),
])
def test_a_difference_names_variant_figure_and_both_values(figure, value, said):
    (message,) = checked({**ROW, figure: value})
    assert message == f"{DEFAULT.name}: {said}. If it is meant: python benchmarks/static.py --pin"


def test_two_programs_on_an_sm_stay_two():
    pinned = {**ROW, "registers": 126}
    assert checked({**ROW, "registers": 128}, pinned=pinned) == []
    assert "registers was 126, is 129 (at most 128)" in checked({**ROW, "registers": 129}, pinned=pinned)[0]


@pytest.mark.parametrize("figure, value, said", [
    ("spill", 4, "spill is 4, at most 0"),
    ("shared", 164 * 1024, "shared is 164.0 KiB, sm_80 has 163"),
    ("notes", "C7515", "the assembler serialises wgmma (C7515)"),
    ("copies", 0, "copies is 0: the main loop waits for every tile of k and v"),
    ("tensor", None, "there is no loop with tensor instructions"),
])
def test_hard_limits_hold_whatever_is_pinned_and_whichever_triton(figure, value, said):
    row = {**ROW, figure: value}
    assert checked(row, "3.7.0", pinned=row) == checked(row, pinned=row) == [f"{DEFAULT.name}: {said}"]


def test_limits_know_what_the_defaults_launch():
    assert checked({**ROW, "spill": 4}, "3.7.0") == [f"{DEFAULT.name}: spill is 4, at most 0"]
    assert checked({**ROW, "spill": 128, "loop_spill": 12}, "3.7.0", OTHER) == []
    assert len(checked({**ROW, "spill": 132, "loop_spill": 13}, "3.7.0", OTHER)) == 2
    lists = next(variant for variant in default_variants("sm_80") if variant.kernel == "tile lists")
    assert checked({"spill": 0, "shared": 0, "atomics": 0, "notes": ""}, "3.7.0", lists) == []
    only_assembled = default_variants("sm_103")[0]
    assert checked({"spill": 0, "shared": 0, "notes": ""}, "3.7.0", only_assembled) == []


@pytest.mark.parametrize("overlapped", [None, 2])
def test_the_kernel_for_hopper_overlaps_products_and_exponentials(overlapped):
    variant = next(v for v in variants("sm_90") if v.kernel == "hopper reading")
    row = {**ROW, "copies": 0, "overlapped": 66}
    assert checked(row, "3.7.0", variant) == []
    row = {**row, "overlapped": overlapped, "spill": 8}
    assert checked(row, "3.7.0", variant) == [
        f"{variant.name}: spill is 8, at most 0",
        f"{variant.name}: {overlapped or 0} exponentials are computed while a product is under way, "
        "at least 64 should be"]


def test_another_triton_leaves_the_pins_alone():
    assert checked({**ROW, "loop": 900}, "3.7.0") == []
    assert pins.version_note({"triton": "3.6.0"}, "3.7.0") == (
        "Triton 3.7.0 is not the pinned 3.6.0: only the hard limits are checked.")
    assert pins.version_note({"triton": "3.6.0"}, "3.6.0") == ""


def test_new_and_missing_variants_are_named():
    assert checked(ROW, names=[DEFAULT.name, "sm_89 attention d256"]) == [
        "sm_89 attention d256: has no pin. If it is meant: python benchmarks/static.py --pin"]
    assert checked(ROW, names=[]) == [
        f"{DEFAULT.name}: is pinned but no longer among the variants. If it is meant: "
        "python benchmarks/static.py --pin"]


def test_pins_are_read_as_they_were_written(tmp_path, monkeypatch):
    monkeypatch.setattr(pins, "PINS", tmp_path / "pins.json")
    pins.store("3.6.0", {DEFAULT.name: {**ROW, "opcodes": {"HMMA": 128}}})
    assert pins.load() == {"triton": "3.6.0", "variants": {DEFAULT.name: ROW}}
    assert len(pins.PINS.read_text(encoding="utf-8").splitlines()) == 6


def test_a_compiler_that_aborts_is_a_row_and_the_rest_goes_on(tmp_path):
    script = tmp_path / "aborts.py"
    script.write_text("import os, sys\nfor line in sys.stdin:\n    if 'max' in line:\n        os._exit(7)\n"
                      "    print('{\"spill\": 0}', flush=True)\n", encoding="utf-8")
    wanted = [variant for variant in variants("sm_80") if variant.kernel == "attention"]
    rows = compile_all(str(script), wanted, 1)
    problem = {"problem": "the compiler ended its process, status 7"}
    assert [variant.form.criterion for variant in wanted].count("max") == 1 and len(rows) == len(wanted) > 4
    assert all(row == (problem if variant.form.criterion == "max" else {"spill": 0}) for variant, row in rows.items())
    assert checked(problem) == [f"{DEFAULT.name}: does not compile: the compiler ended its process, status 7"]


def test_a_bad_choice_is_seen(static):
    """Recording in registers on Hopper serialises wgmma; four warps for 128 x 128 scores spill."""
    if not static.triton_version().startswith("3.6."):
        pytest.skip("what another Triton makes of these is not known")
    code = f"""
import json, sys
sys.path[:0] = [{str(pins.PINS.parent)!r}, {str(pins.PINS.parents[1] / "tools")!r}]
from load_pack import load_pack
load_pack()
from dataclasses import replace
from support.pins import limits
from support.sass import metrics
from support.variants import all_variants, compile_variant, config_of
variant = next(v for v in all_variants("sm_90") if not v.form.ragged and not v.form.pool_skipped)
for changes in ({{"record_in_registers": True}}, {{"num_warps": 4, "tma": False}}):
    row = metrics(*compile_variant(variant, replace(config_of(variant), **changes)))
    print(json.dumps(limits(variant, row)))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    per_row, four_warps = map(json.loads, done.stdout.splitlines())
    assert any("serialises wgmma (C75" in text for text in per_row), per_row
    assert any("spill is" in text for text in four_warps), four_warps
