"""What a compiled kernel's machine code holds: its main loop, counted, and what the assembler said about it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@(!?U?P\w+)\s+)?([A-Z][A-Za-z0-9_.]*)(.*)$")
_LABEL = re.compile(r"^([.$]\S+):\s*$")
_TARGET = re.compile(r"`\(([^)]+)\)")

TENSOR = ("HMMA", "IMMA", "QMMA", "DMMA", "HGMMA", "IGMMA", "QGMMA", "UTCHMMA", "UTCIMMA", "UTCQMMA")
"""Tensor core instructions: mma.sync, wgmma, tcgen05."""
COPIES = ("LDGSTS", "UTMALDG", "UBLKCP")
"""Copies from global to shared memory that the program does not wait for: cp.async, TMA."""
ATOMICS = ("RED", "REDG", "ATOM", "ATOMG", "UTMAREDG", "UBLKRED")
"""Atomics and reductions in global memory; REDUX, ATOMS and UTCATOMSWS are none."""
SERIALISED = re.compile(r"\((C75(?:0[1-9]|1\d))\)")
"""The assembler's notes that wgmma instructions wait for each other."""


@dataclass(frozen=True)
class Instruction:
    """opcode: with its modifiers, "HMMA.16816.F32.BF16". target: the label it may jump to. pending: of a wait for
    wgmma, how many groups may still be under way after it."""

    opcode: str
    conditional: bool = False
    target: str | None = None
    pending: int | None = None

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def ends_block(self) -> bool:
        """Whether something else than the next instruction may follow it."""
        return self.target is not None or self.name in ("EXIT", "RET", "BRX", "JMX")

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may follow it."""
        return self.conditional or not self.ends_block


@dataclass(frozen=True)
class Code:
    """The instructions of one kernel, and which of them each label precedes."""

    instructions: list[Instruction]
    labels: dict[str, int]

    def count(self, names: Iterable[str]) -> int:
        """Instructions with one of these names."""
        wanted = set(names)
        return sum(i.name in wanted for i in self.instructions)


def parse(text: str, kernel: str) -> Code:
    """The code of `kernel` in what `nvdisasm -c` printed."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    inside = False
    for line in text.splitlines():
        if line.strip().startswith(".section\t"):
            inside = re.search(rf"\.text\.{re.escape(kernel)}\b", line) is not None
        elif inside and (label := _LABEL.match(line)):
            labels[label[1]] = len(instructions)
        elif inside and (found := _INSTRUCTION.match(line)):
            instructions.append(_instruction(*found.groups()))
    if not instructions:
        raise ValueError(f"no instructions of {kernel} in the disassembly")
    return Code(instructions, labels)


def _instruction(predicate: str | None, opcode: str, rest: str) -> Instruction:
    name = opcode.partition(".")[0]
    target = _TARGET.search(rest)
    # The assembler also leaves loops by calls without return address; calls of functions ($…) come back.
    jumps = name in ("BRA", "CALL", "JMP") and target is not None and not target[1].startswith("$")
    own = name == "BRA" and (opcode.startswith(("BRA.U", "BRA.DIV")) or re.match(r"\s*!?U?P\d", rest) is not None)
    conditional = own or (predicate is not None and predicate.lstrip("!") not in ("PT", "UPT"))
    pending = re.search(r"gsb0, (0x[0-9a-f]+)", rest) if opcode.startswith("WARPGROUP.DEPBAR") else None
    return Instruction(opcode, conditional, target[1] if jumps else None, int(pending[1], 16) if pending else None)


def loops(code: Code) -> list[list[int]]:
    """All loops as ascending instruction numbers, in the order of their entries' addresses.

    Natural loops of the control flow graph and not address ranges: waiting for a barrier is moved out of line, behind
    the kernel's end, and belongs to the loop all the same.
    """
    starts, blocks, follows = _graph(code)
    found: dict[int, set[int]] = {}
    before: dict[int, set[int]] = {}
    for block, after in follows.items():
        for next_block in after:
            before.setdefault(next_block, set()).add(block)
    for tail, head in _back_edges(follows, starts[0]):
        members, stack = {head, tail}, [tail] if tail != head else []
        while stack:
            for block in before.get(stack.pop(), ()):
                if block not in members:
                    members.add(block)
                    stack.append(block)
        found.setdefault(head, set()).update(members)
    return [sorted(i for block in found[head] for i in blocks[block]) for head in sorted(found)]


def _graph(code: Code) -> tuple[list[int], dict[int, range], dict[int, list[int]]]:
    """Basic blocks by their first instruction: starts, instructions, successors."""
    end = len(code.instructions)
    cuts = {0, *(i for i in code.labels.values() if i < end)}
    cuts |= {i + 1 for i, x in enumerate(code.instructions) if x.ends_block and i + 1 < end}
    starts = sorted(cuts)
    blocks = {start: range(start, stop) for start, stop in zip(starts, [*starts[1:], end], strict=True)}
    follows = {}
    for start, block in blocks.items():
        last = code.instructions[block[-1]]
        after = [block.stop] if last.falls_through and block.stop < end else []
        if last.target in code.labels and code.labels[last.target] < end:
            after.append(code.labels[last.target])
        follows[start] = after
    return starts, blocks, follows


def _back_edges(follows: dict[int, list[int]], entry: int) -> list[tuple[int, int]]:
    """Edges into a block that leads to their own start, by depth-first search."""
    found, seen, on_path = [], {entry}, {entry}
    stack = [(entry, iter(follows[entry]))]
    while stack:
        block, rest = stack[-1]
        following = next(rest, None)
        if following is None:
            on_path.discard(block)
            stack.pop()
        elif following in on_path:
            found.append((block, following))
        elif following not in seen:
            seen.add(following)
            on_path.add(following)
            stack.append((following, iter(follows[following])))
    return found


def main_loop(code: Code) -> list[Instruction] | None:
    """The loop over tiles: the one with the most tensor instructions; None if no loop has any.

    The loop for a partial last tile has as many and stands behind it, so among equals the first counts.
    """
    best: list[Instruction] | None = None
    most = 0
    for numbers in loops(code):
        inside = [code.instructions[i] for i in numbers]
        tensor = sum(x.name in TENSOR for x in inside)
        if tensor > most:
            best, most = inside, tensor
    return best


def overlapped(loop: list[Instruction]) -> int | None:
    """Exponentials between the wait for one product and that for the product issued after it, which is then computed
    meanwhile; None without such a pair of waits."""
    waits = [(i, x.pending) for i, x in enumerate(loop) if x.pending is not None]
    for (first, more), (second, none) in zip(waits, waits[1:], strict=False):
        if more and not none:
            return sum(x.name == "MUFU" for x in loop[first:second])
    return None


def disassemble(cubin: bytes) -> str:
    """Text of a cubin by Triton's own disassembler."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([triton.knobs.nvidia.nvdisasm.path, "-c", str(path)], capture_output=True, text=True,
                              check=True).stdout


def assembler_report(said: str) -> dict:
    """registers, spill (bytes stored or loaded, the larger), notes (serialised wgmma) of what `ptxas -v` wrote on one
    kernel."""
    spill = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    registers = re.search(r"Used (\d+) registers", said)
    if spill is None or registers is None:
        raise ValueError(f"the assembler's report holds no registers or spills: {said[:200]!r}")
    return {"registers": int(registers[1]), "spill": max(int(spill[1]), int(spill[2])),
            "notes": " ".join(sorted(set(SERIALISED.findall(said))))}


def tensor_text(loop: Iterable[Instruction]) -> str:
    """"64 HMMA.16816.F32.BF16 + 4 IGMMA.64x128x32.S8.S8"."""
    counted = Counter(_shape(x.opcode) for x in loop if x.name in TENSOR)
    return " + ".join(f"{n} {name}" for name, n in sorted(counted.items()))


def _shape(opcode: str) -> str:
    """The opcode without what does not tell the work: where an operand comes from, saturation."""
    return ".".join(part for part in opcode.split(".") if part not in ("gdesc", "SAT", "tnspA", "tnspB"))


def nvidia_metrics(code: Code, said: str, shared: int) -> dict:
    """The figures of one kernel that the gate pins, and `opcodes`: the main loop's instructions by name.

    `loop`, `tensor`, `copies`, `exp2` (and other special functions), `shared_reads` (LDSM and LDS), `barriers` and
    `loop_spill` (STL and LDL) are those of the main loop, `atomics` and `instructions` those of the whole kernel;
    `overlapped`: see there, missing where that is None.

    Args:
        said: what `ptxas -v` wrote on it.
        shared: bytes of shared memory that it is launched with.
    """
    row = {**assembler_report(said), "shared": shared, "atomics": code.count(ATOMICS),
           "instructions": len(code.instructions) - code.count(["NOP"])}
    loop = main_loop(code)
    if loop is None:
        return row
    names = Counter(x.name for x in loop)
    if (n := overlapped(loop)) is not None:
        row["overlapped"] = n
    return {**row, "loop": len(loop), "tensor": tensor_text(loop), "copies": sum(names[x] for x in COPIES),
            "exp2": names["MUFU"], "shared_reads": names["LDSM"] + names["LDS"], "barriers": names["BAR"],
            "loop_spill": names["STL"] + names["LDL"], "opcodes": dict(sorted(names.items()))}


def amd_metrics(code: str, shared: int) -> dict:
    """The same from the assembly text of AMD's compiler; tensor instructions are those of the whole kernel."""
    registers, spilled = (int(re.search(rf"\.{name}:\s+(\d+)", code)[1]) for name in ("vgpr_count", "vgpr_spill_count"))
    tensor = Counter(re.findall(r"\bv_(?:s?w?mfmac?|wmma)_\w+", code))
    return {"registers": registers, "spill": 4 * spilled, "shared": shared, "notes": "",
            "atomics": len(re.findall(r"\b(?:global|flat|buffer)_atomic", code)),
            "kernel_tensor": " + ".join(f"{n} {name}" for name, n in sorted(tensor.items()))}


def metrics(compiled, said: str) -> dict:
    """Figures of a `triton.compiler.CompiledKernel`, see `nvidia_metrics` and `amd_metrics`."""
    shared = compiled.metadata.shared
    if "cubin" not in compiled.asm:
        return amd_metrics(compiled.asm["amdgcn"], shared)
    try:
        text = disassemble(compiled.asm["cubin"])
    except subprocess.CalledProcessError:  # an architecture that the disassembler does not know
        return {**assembler_report(said), "shared": shared}
    return nvidia_metrics(parse(text, compiled.metadata.name), said, shared)
