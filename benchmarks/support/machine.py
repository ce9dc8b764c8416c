"""A GPU as a few public rates, and how long our kernels' counted instructions take on it. Nothing here is measured."""

from __future__ import annotations

import heapq
import re
from collections.abc import Sequence
from dataclasses import dataclass

TILE = 128

LATENCY_CYCLES = 800
"""Assumed: from a load's issue to its data from memory, under load. A program waits for it twice before its loop."""
LAUNCH_US = 2.0
"""Assumed: GPU time between a kernel and the next one on its stream."""
EXPAND_RATE = 2.0
"""Assumed: instructions an SM issues per cycle in the expansion, of 4: its sums depend on each other."""


@dataclass(frozen=True)
class Machine:
    """Rates of one GPU.

    Attributes:
        arch: whose kernels it runs.
        clock: GHz at which `mac` gives the vendor's peak.
        sustained: share of that peak that large matrix products reach, for power; taken off the clock.
        mac: tensor multiply-adds per cycle and SM: "f32" (float16 and bfloat16 with float32 accumulation), "f16"
            (float16 accumulation), "s8".
        exp2: special functions per cycle and SM.
        l2, hbm: bytes per second.
        registers, shared, threads: of one SM, in 32-bit registers, bytes, number.
    """

    name: str
    arch: str
    sms: int
    clock: float
    sustained: float
    mac: dict[str, int]
    exp2: int
    l2: float
    hbm: float
    registers: int
    shared: int
    threads: int

    @property
    def hertz(self) -> float:
        """Cycles per second under load."""
        return 1e9 * self.clock * self.sustained


# Peaks: 989.4 TFLOP/s bfloat16, 1979 TOP/s INT8 dense, 4.8 TB/s (NVIDIA H200 datasheet; H100 whitepaper for 132 SMs;
# 989.4e12 = 132 * 1.83e9 * 2 * 2048). Special functions: CUDA C++ Programming Guide, arithmetic throughput, 16 a cycle.
# 0.8: large matrix products on H100 and H200 are published at 770 to 800 TFLOP/s. L2: there is no official figure;
# 5.5 TB/s is assumed, and a `limit` "l2" is no more than a hint.
H200 = Machine("H200", "sm_90", 132, 1.83, 0.80, {"f32": 2048, "f16": 2048, "s8": 4096}, 16, 5.5e12, 4.8e12,
               65536, 228 * 1024, 2048)
# Peaks: 165.2 TFLOP/s float16 with float32 and 330.3 with float16 accumulation, 660.6 TOP/s INT8, 1008 GB/s, 128 SMs,
# 2.52 GHz boost (NVIDIA Ada GPU architecture whitepaper, appendix A; 165.2e12 = 128 * 2.52e9 * 2 * 256). 1.0: cards run
# above the nominal boost. L2: as above.
RTX4090 = Machine("RTX 4090", "sm_89", 128, 2.52, 1.0, {"f32": 256, "f16": 512, "s8": 1024}, 16, 5.0e12, 1.008e12,
                  65536, 100 * 1024, 1536)
MACHINES = (H200, RTX4090)

PUBLISHED = (
    (H200, 128, "Triton tutorial kernel, H100 (triton-lang PR 7658, tritonbench)", 469, 487),
    (H200, 64, "Triton kernel, H100 (FlashAttention-3, arXiv 2407.08608)", 403, 403),
    (RTX4090, 128, "FlashAttention-2 style kernels", 159, 163),
)
"""TFLOP/s that others measured with kernels scheduled like our dense loop, at 8k to 16k tokens, not causal."""


@dataclass(frozen=True)
class TileCost:
    """Cycles that one compute tile keeps each unit of an SM busy, and what comes of them.

    Attributes:
        resident: programs on an SM at a time.
        fixed: cycles of a program outside its loop.
    """

    tensor: float
    issue: float
    exp2: float
    shared: float
    l2: float
    resident: int
    fixed: float

    @property
    def softmax(self) -> float:
        """Cycles of exponentials and of everything else that is issued, side by side."""
        return max(self.issue, self.exp2)

    @property
    def overlapped(self) -> float:
        """Cycles if tensor cores and softmax work side by side."""
        return max(self.tensor, self.softmax)

    @property
    def serial(self) -> float:
        """Cycles if the tensor cores wait while the softmax runs."""
        return self.tensor + self.softmax

    @property
    def cycles(self) -> float:
        """Between the two: barriers in every tile keep a program's warps in step, so that within a program matrix
        products and softmax take turns; other programs on the SM fill the gaps. Copies run beside both."""
        return max(self.overlapped + (self.serial - self.overlapped) / self.resident, self.shared, self.l2)

    @property
    def limit(self) -> str:
        """What more of would help most."""
        for unit in ("l2", "shared"):
            if getattr(self, unit) >= self.cycles:
                return unit
        return max(("tensor", "issue", "exp2"), key=lambda unit: getattr(self, unit))


def launch_of(pin: dict) -> tuple[int, int, int]:
    """BLOCK_M, BLOCK_N and warps of a pinned variant."""
    return tuple(map(int, re.match(r"(\d+)x(\d+) w(\d+)", pin["launch"]).groups()))


def macs(text: str) -> dict[str, int]:
    """Multiply-adds per warp by kind, of "64 HMMA.16816.F16 + 32 IMMA.16832.S8.S8"."""
    found: dict[str, int] = {}
    for part in text.split(" + "):
        number, opcode = part.split()
        name, shape, *kinds = opcode.split(".")
        kind = "s8" if name in ("IMMA", "IGMMA") else "f16" if kinds[:1] == ["F16"] else "f32"
        if "x" in shape:  # wgmma: four warps together
            m, n, k = map(int, shape.split("x"))
            each = m * n * k // 4
        else:
            each = {"16816": 16 * 8 * 16, "16832": 16 * 8 * 32, "1688": 16 * 8 * 8}[shape]
        found[kind] = found.get(kind, 0) + int(number) * each
    return found


def tile_cost(machine: Machine, pin: dict, head_dim: int, int8: bool, v_bytes: int = 2) -> TileCost:
    """What the counted instructions of one variant's main loop cost on `machine`.

    Args:
        pin: its figures in `static_pins.json`.
        v_bytes: per element of v.
    """
    block_m, block_n, warps = launch_of(pin)
    tensor = sum(warps * n / machine.mac[kind] for kind, n in macs(pin["tensor"]).items())
    k_bytes, v_bytes = block_n * head_dim * (1 if int8 else 2), block_n * head_dim * v_bytes
    if "GMMA" in pin["tensor"]:  # the tensor cores read k and v for every 64 rows, and q for the scores
        read = block_m // 64 * (k_bytes + v_bytes) + block_m * head_dim * (1 if int8 else 2)
    else:
        read = pin["shared_reads"] * warps * 512  # ldmatrix of four 8 x 8 matrices
    per_thread = -(-pin["registers"] // 8) * 8
    resident = max(1, min(machine.registers // (per_thread * 32 * warps), machine.shared // (pin["shared"] + 1024),
                          machine.threads // (32 * warps)))
    return TileCost(
        tensor=tensor, issue=pin["loop"] * warps / 4, exp2=pin["exp2"] * warps * 32 / machine.exp2,
        shared=(read + k_bytes + v_bytes) / 128,  # 128 bytes a cycle
        l2=(k_bytes + v_bytes) / (machine.l2 / machine.hertz / machine.sms), resident=resident,
        fixed=2 * LATENCY_CYCLES + max(0, pin["instructions"] - 2 * pin["loop"]) * warps / 4)


def makespan(costs: Sequence[float], places: int) -> float:
    """When the last of the programs ends, each started in its turn on the first free place."""
    free = [0.0] * places
    for cost in costs:
        heapq.heapreplace(free, free[0] + cost)
    return max(free)


@dataclass(frozen=True)
class Call:
    """One predicted call.

    Attributes:
        ms: of the whole call; `beside_ms` of it expansion, quantisation, launches.
        balance: share of the SMs' time that is work, 0..1; the rest waits for the last rows.
        limit: what more of would make it faster.
    """

    ms: float
    beside_ms: float
    balance: float
    limit: str


def predict(machine: Machine, cost: TileCost, block_n: int, counts: Sequence[int], *, tokens: int, heads: int,
            head_dim: int, sorted_rows: bool, expand: dict | None, int8: bool, v_fp16: bool) -> Call:
    """A call from its rows' numbers of active mask tiles.

    Args:
        counts: per row, in the order of the grid; BLOCK_M is 128.
        sorted_rows: costly rows first, as in calls of less than 16384 tokens with a mask.
        expand: pin of the expansion; None without a mask.
    """
    k_tiles = -(-tokens // TILE)
    parts = TILE // block_n
    if sorted_rows:
        counts = sorted(counts, key=lambda n: -min(n * 16 // k_tiles, 15))
    works = [cost.fixed + n * parts * cost.cycles * cost.resident for n in counts]
    places = machine.sms * cost.resident
    last = makespan(works, places)
    attention = last / machine.hertz
    elements = heads * tokens * head_dim
    k_bytes, v_bytes = (1, 2) if int8 else (2, 2)
    times = {"SMs": attention, "l2": sum(counts) * TILE * head_dim * (k_bytes + v_bytes) / machine.l2,
             "hbm": elements * (2 * k_bytes + v_bytes + 2) / machine.hbm}
    beside = LAUNCH_US * 1e-6
    if expand is not None:
        words = -(-k_tiles // 32)
        chunk = 8 if words <= 8 else 32
        passes = -(-words // chunk) * chunk / 8  # the pinned variant goes through 8 words
        beside += (LAUNCH_US * 1e-6
                   + len(counts) * expand["instructions"] * passes / EXPAND_RATE * 4 / machine.sms / machine.hertz)
    if int8:
        # Bytes per element: k for its mean; q, k in and out; v in and out where it is scaled.
        beside += 2 * LAUNCH_US * 1e-6 + elements * (2 + 6 + (4 if v_fp16 else 0)) / machine.hbm
    where = max(times, key=times.get)
    balance = sum(works) / places / last
    limit = where if where != "SMs" else cost.limit if balance > 0.85 else "last rows"
    return Call(1e3 * (times[where] + beside), 1e3 * beside, balance, limit)
