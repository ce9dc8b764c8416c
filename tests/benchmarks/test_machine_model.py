"""The machine model: its units, its schedule, and that it never passes for a measurement."""

import json

import pytest
from support import pins
from support.machine import H200, MACHINES, RTX4090, macs, makespan, predict, tile_cost

VARIANTS = pins.load()["variants"]


@pytest.fixture(scope="module")
def model(script):
    return script("machine_model")


@pytest.mark.parametrize("text, expected", [
    ("128 HMMA.16816.F32.BF16", {"f32": 128 * 2048}),
    ("64 HMMA.16816.F16 + 32 IMMA.16832.S8.S8", {"f16": 64 * 2048, "s8": 32 * 4096}),
    ("8 HGMMA.64x128x16.F32.BF16 + 4 IGMMA.64x128x32.S8.S8", {"f32": 8 * 32768, "s8": 4 * 65536}),
    ("6 HGMMA.64x128x16.F32.BF16 + 8 HGMMA.64x32x16.F32.BF16", {"f32": 6 * 32768 + 8 * 8192}),
])
def test_multiply_adds_of_tensor_instructions(text, expected):
    assert macs(text) == expected


@pytest.mark.parametrize("machine, int8, products", [
    (H200, False, {"f32": 2}), (H200, True, {"s8": 1, "f32": 1}),
    (RTX4090, False, {"f32": 2}), (RTX4090, True, {"s8": 1, "f16": 1})])
def test_counted_tensor_instructions_are_the_work_of_a_tile(machine, int8, products):
    """Q·K and P·V of one compute tile, at this GPU's rate for each: nothing computed twice, nothing missed."""
    pin = VARIANTS[f"{machine.arch} read d128 bf16{' int8' if int8 else ''} ragged"]
    block_n = int(pin["launch"].split()[0].split("x")[1])
    cost = tile_cost(machine, pin, 128, int8)
    assert cost.tensor == sum(n * 128 * block_n * 128 / machine.mac[kind] for kind, n in products.items())
    exponentials = 128 * block_n / machine.exp2
    assert exponentials < cost.exp2 < 1.15 * exponentials  # the rest rescales the rows
    assert cost.overlapped <= cost.cycles <= max(cost.serial, cost.l2, cost.shared)


def test_peaks_are_the_published_ones():
    assert 2e-3 * H200.sms * H200.clock * H200.mac["f32"] == pytest.approx(989.4, rel=1e-3)
    assert 2e-3 * RTX4090.sms * RTX4090.clock * RTX4090.mac["f32"] == pytest.approx(165.2, rel=1e-3)


def test_programs_share_an_sm_as_registers_and_shared_memory_allow():
    pin = VARIANTS["sm_90 read d64 bf16 ragged"]
    assert tile_cost(H200, pin, 64, False).resident == 2
    assert tile_cost(H200, {**pin, "registers": 129}, 64, False).resident == 1
    assert tile_cost(H200, {**pin, "shared": 120 * 1024}, 64, False).resident == 1


def test_makespan():
    assert makespan([1.0] * 4, 2) == 2.0 and makespan([1.0] * 5, 2) == 3.0
    assert makespan([1.0, 1.0, 3.0], 2) == 4.0 and makespan([3.0, 1.0, 1.0], 2) == 3.0


def test_the_last_rows_and_their_order():
    cost = tile_cost(H200, VARIANTS["sm_90 read d128 bf16 ragged"], 128, False)

    def call(counts, **changes):
        return predict(H200, cost, 128, counts, **{
            "tokens": 8192, "heads": 2, "head_dim": 128, "sorted_rows": False, "expand": None, "int8": False,
            "v_fp16": False, **changes})

    full, one_more = call([64] * 132), call([64] * 133)
    assert full.balance == 1.0 and full.limit == "tensor"
    assert one_more.balance == pytest.approx(133 / 264) and one_more.limit == "last rows"
    assert one_more.ms - one_more.beside_ms == pytest.approx(2 * (full.ms - full.beside_ms))
    skewed = [4] * 264 + [64] * 20
    assert call(skewed, sorted_rows=True).ms < 0.95 * call(skewed).ms
    expand = VARIANTS["sm_90 expand"]
    assert call([64] * 132, expand=expand).ms > full.ms
    assert call([64] * 132, int8=True).beside_ms > full.beside_ms


@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: m.name)
def test_predictions_are_possible(model, machine):
    predicted = model.Model(machine, VARIANTS)
    rows = predicted.calls(8192, 4, 128, [0.0, 0.57, 0.77])
    assert {row["variant"] for row in rows} == {
        f"{form}{int8}" for form in ("dense", "read", "record") for int8 in ("", " int8")}
    for row in rows:
        peak = 2e-12 * machine.sms * machine.hertz * machine.mac["s8" if "int8" in row["variant"] else "f32"]
        assert 0.2 * peak < row["tflops"] * (2 if "int8" in row["variant"] else 1) and row["tflops"] < peak
    read = [row for row in rows if row["variant"] == "read"]
    record = [row for row in rows if row["variant"] == "record"]
    assert read[0]["ms"] > read[1]["ms"] > read[2]["ms"]
    assert all(a["ms"] < b["ms"] for a, b in zip(read, record, strict=True))
    assert predicted.call("record", 8192, 4, 64, 0.5) is not None
    assert predicted.call("record", 8192, 4, 64, 0.5, int8=True) is None  # not among the pinned variants


def test_the_readme_states_the_miss_against_what_others_measured(model):
    readme = (pins.PINS.parent / "README.md").read_text(encoding="utf-8").split("## machine_model.py")[1]
    for row in model.published(VARIANTS):
        assert f"| {row['published']} | {row['miss']} |" in readme, row


def test_measured_times_stand_beside_predictions(model, tmp_path, capsys):
    row = {"contender": "read full", "form": "read", "precision": "full", "head_dim": 128, "dtype": "bfloat16",
           "tokens": 8192, "heads": 4, "sparsity": 0.57, "median_ms": 1.0}
    result = {"device": "NVIDIA H200", "rows": [
        row, {**row, "contender": "sage", "form": "dense", "precision": "int8"}, {**row, "median_ms": None},
        {**row, "contender": "list full", "form": "list", "median_ms": 2.0}]}
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(result), encoding="utf-8")
    assert model.main(["--measured", str(path)]) == 0
    said = capsys.readouterr().out
    assert "Not measurements" in said and "in 2 rows" in said and "sage" not in said
    first, second = model.beside_measured(result, VARIANTS)
    assert first["ratio"] == 1.0 / first["ms"] and second["ms"] > first["ms"]
    path.write_text(json.dumps({**result, "device": "cpu"}), encoding="utf-8")
    with pytest.raises(SystemExit, match="the result is of 'cpu'; there are models of H200, RTX 4090"):
        model.main(["--measured", str(path)])


def test_the_command_says_that_it_predicts(model, capsys):
    assert model.main(["--gpu", "RTX 4090", "--tokens", "8192", "--sparsity", "0", "0.77"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("PREDICTIONS") and "RTX 4090, predicted: 8192 tokens, 32 heads" in said
    assert "H200, predicted" not in said


def test_rows_are_sorted_where_the_launcher_sorts_them(model):
    pytest.importorskip("triton", reason="needs Triton")
    from liteattention.kernels.triton_launch import COST_ORDER_MAX_TOKENS

    assert model.COST_ORDER_MAX_TOKENS == COST_ORDER_MAX_TOKENS
