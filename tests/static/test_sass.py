"""The parser of machine code, on literal snippets of what `nvdisasm -c` prints."""

import pytest
from support.sass import (
    amd_metrics,
    assembler_report,
    loops,
    main_loop,
    nvidia_metrics,
    overlapped,
    parse,
    tensor_text,
)

SAID = """ptxas info    : Compiling entry function 'kernel' for 'sm_89'
    0 bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 254 registers, used 1 barriers{note}
"""


def code(*lines):
    """Labels end with a colon; everything else is an instruction."""
    text = ["\t.section\t.nv.info.kernel,\"\"", "        /*0000*/                   NOT.COUNTED R1 ;",
            "\t.section\t.text.kernel,\"ax\",@progbits", ".text.kernel:"]
    for i, line in enumerate(lines):
        text.append(line if line.endswith(":") else f"        /*{16 * i:04x}*/                   {line} ;")
    return parse("\n".join([*text, "\t.section\t.text.other,\"ax\"", "        /*0000*/                   BRA R0 ;"]),
                 "kernel")


SIMPLE = ("MOV R1, c[0x0][0x28]", ".L_x_0:", "LDGSTS.E.BYPASS.128 [R2], desc[UR4][R6.64]",
          "HMMA.16816.F32.BF16 R4, R8, R12, R4", "MUFU.EX2 R5, R5", "@P0 BRA `(.L_x_0)",
          "RED.E.OR.STRONG.GPU desc[UR4][R2.64], R5", "EXIT")


def test_a_loop_is_found():
    parsed = code(*SIMPLE)
    assert len(parsed.instructions) == 7 and parsed.labels == {".text.kernel": 0, ".L_x_0": 1}
    assert [x.name for x in main_loop(parsed)] == ["LDGSTS", "HMMA", "MUFU", "BRA"]
    row = nvidia_metrics(parsed, SAID.format(stores=8, loads=12, note=""), 65536)
    row.pop("opcodes")
    assert row == {"registers": 254, "spill": 12, "notes": "", "shared": 65536, "atomics": 1, "instructions": 7,
                   "loop": 4, "tensor": "1 HMMA.16816.F32.BF16", "copies": 1, "exp2": 1, "shared_reads": 0,
                   "barriers": 0, "loop_spill": 0}


def test_a_wait_out_of_line_belongs_to_its_loop():
    parsed = code(".L_x_0:", "@!P1 BRA `(.L_x_9)", ".L_x_1:", "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24",
                  "@P0 BRA `(.L_x_0)", "EXIT", ".L_x_9:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R2], R3",
                  "@!P1 BRA `(.L_x_9)", "BRA `(.L_x_1)")
    assert [len(x) for x in loops(parsed)] == [6, 2]
    assert [x.name for x in main_loop(parsed)] == ["BRA", "HGMMA", "BRA", "SYNCS", "BRA", "BRA"]


def test_without_an_edge_back_there_is_no_loop():
    assert main_loop(code("HMMA.16816.F32 R4, R8, R12, R4", "BRA `(.L_x_1)", ".L_x_1:", "EXIT")) is None
    # The trap behind every kernel, which jumps to itself, has no tensor instruction.
    assert main_loop(code("HMMA.16816.F32 R4, R8, R12, R4", "EXIT", ".L_x_1:", "BRA `(.L_x_1)")) is None


@pytest.mark.parametrize("jump, conditional", [
    ("@P0 BRA `(.L_x_0)", True), ("@!P3 BRA `(.L_x_0)", True), ("@!UP0 BRA `(.L_x_0)", True),
    ("BRA P0, `(.L_x_0)", True), ("BRA !UP1, `(.L_x_0)", True), ("BRA.U UP0, `(.L_x_0)", True),
    ("BRA.DIV UR4, `(.L_x_0)", True), ("@PT BRA `(.L_x_0)", False), ("BRA `(.L_x_0)", False),
    ("@P0 CALL.REL.NOINC `(.L_x_0)", True)])
def test_predicated_jumps(jump, conditional):
    parsed = code(".L_x_0:", "HMMA.16816.F32 R4, R8, R12, R4", jump, "EXIT")
    jumping = parsed.instructions[1]
    assert jumping.target == ".L_x_0" and jumping.conditional is conditional
    assert len(main_loop(parsed)) == 2


def test_a_called_function_comes_back():
    (call, after) = code("CALL.REL.NOINC `($kernel$__internal_0)", "EXIT").instructions
    assert call.target is None and call.falls_through and not after.falls_through


def test_of_equal_loops_the_first_is_the_main_one():
    parsed = code(".L_x_0:", "HMMA.16816.F32 R4, R8, R12, R4", "@P0 BRA `(.L_x_0)", ".L_x_1:", "FADD R1, R1, R1",
                  "HMMA.16816.F32 R4, R8, R12, R4", "@P0 BRA `(.L_x_1)", "EXIT")
    assert len(loops(parsed)) == 2 and len(main_loop(parsed)) == 2


def test_tensor_instructions_are_named_by_their_work():
    parsed = code("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], !UPT", "{ HMMA.16816.F16 R4, R8, R12, R4",
                  "IGMMA.64x128x32.S8.S8.SAT R24, gdesc[UR8], R24",
                  "HGMMA.64x128x16.F32.BF16.tnspB R24, R4, gdesc[UR8]")
    assert tensor_text(parsed.instructions) == (
        "2 HGMMA.64x128x16.F32.BF16 + 1 HMMA.16816.F16 + 1 IGMMA.64x128x32.S8.S8")


def test_exponentials_that_a_product_runs_beside():
    begins, ends = "WARPGROUP.DEPBAR.LE gsb0, 0x1", "WARPGROUP.DEPBAR.LE gsb0, 0x0"

    def counted(*lines):
        return overlapped(code(*lines).instructions)

    assert counted("MUFU.EX2 R1, R1", begins, "MUFU.EX2 R1, R1", "MUFU.EX2 R1, R1", ends, "MUFU.EX2 R1, R1") == 2
    assert counted(begins, ends, "MUFU.EX2 R1, R1") == 0
    assert counted("MUFU.EX2 R1, R1", ends, "MUFU.EX2 R1, R1", ends) is None


def test_what_is_an_atomic():
    parsed = code("REDUX.OR UR4, R2", "ATOMS.ADD R2, [R3], R4", "RED.E.ADD.STRONG.GPU desc[UR4][R2.64], R5",
                  "@P0 REDG.E.OR.STRONG.GPU desc[UR4][R2.64], R5", "ATOMG.E.ADD PT, R2, desc[UR4][R2.64], R5")
    assert nvidia_metrics(parsed, SAID.format(stores=0, loads=0, note=""), 0)["atomics"] == 3


def test_the_assemblers_report():
    note = "\nptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    assert assembler_report(SAID.format(stores=16, loads=4, note=note)) == {
        "registers": 254, "spill": 16, "notes": "C7515"}
    with pytest.raises(ValueError, match="no registers or spills"):
        assembler_report("nothing")
    with pytest.raises(ValueError, match="no instructions of absent"):
        parse("", "absent")


def test_amd():
    text = """ .vgpr_count:     247\n .vgpr_spill_count: 3
    v_wmma_f32_16x16x16_bf16 v[0:7], v[8:15], v[16:23], v[0:7]
    global_atomic_or_b32 v0, v1, s[2:3]"""
    assert amd_metrics(text, 16384) == {"registers": 247, "spill": 12, "shared": 16384, "notes": "", "atomics": 1,
                                        "kernel_tensor": "1 v_wmma_f32_16x16x16_bf16"}
