"""The PTX executor for kernels whose warps run different programs: named barriers, registers moved between warps, jump
tables, arrivals at barriers in memory; and races between any two warps by what orders them, not by barrier intervals.

The executor's source is changed as it is read, one statement at a time: where one is no longer there, nothing runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

MEMBERS = Path(__file__).with_name("warp_specialised.inc")
OPERATIONS = ("NAMEDBAR", "SETREGS", "JUMPTABLE", "MBARRIVE")
"""What the executor lacks; numbered behind its own."""

_CHANGES = (
    (" X(FENCEPROXY)\n", f" X(FENCEPROXY) {' '.join(f'X({name})' for name in OPERATIONS)}\n"),
    ("std::vector<Load> loads; };", "std::vector<Load> loads; u32 index, initialiser, fenced_after; "
                                    "std::vector<u32> arriving, done; };"),
    ("std::vector<bool> ticks;\n};", "std::vector<bool> ticks; std::vector<u32> clock; u64 failed;\n};"),
    # Shared memory: the epochs' checks become those of the clocks.
    ("      if (s.tick && !(s.tick < w->ticks.size() && w->ticks[s.tick])) "
     "fault(K_NOT_WAITED, lane, addr, bytes, s.wpc);\n"
     "      else if (!s.tick && s.wepoch == epoch && (s.wwarps & ~me)) "
     "fault(K_SH_RACE_RW, lane, addr, bytes, s.wpc);\n", "      note_read(addr + i, lane, bytes);\n"),
    ("      if (s.wepoch == epoch && (s.wwarps & ~me)) "
     "fault(same ? K_SH_BENIGN : K_SH_RACE_WW, lane, addr, bytes, s.wpc);\n"
     "      if (s.repoch == epoch && (s.rwarps & ~me)) "
     "fault(same ? K_SH_BENIGN : K_SH_RACE_WR, lane, addr, bytes, s.rpc);\n",
     "      note_write(addr + i, same, lane, bytes);\n"),
    ("s.tick = nexttick; s.generic = 0; s.wpc = L.pc;", "s.generic = 0; s.wpc = L.pc; note_arrival(x + k);"),
    # Barriers in memory.
    ("b.phase++; b.pending = b.count; b.tick = ++tick; events++;",
     "b.phase++; b.pending = b.count; b.tick = 0; events++; completed(b);"),
    ("b.iepoch = epoch; b.iwarp = wi; }", "b.iepoch = epoch; b.iwarp = wi; initialised(b); }"),
    ("if (!b.valid || (b.iepoch == epoch && b.iwarp != wi)) fault(K_MBARRIER, l, ad, 4); b.tx += R(I.a[1])[l]; "
     "b.pending--; events++; mb_check(b);", "b.tx += R(I.a[1])[l]; arrive(b, 1, l, ad);"),
    ("if (!b.valid || (b.iepoch == epoch && b.iwarp != wi)) { fault(K_MBARRIER, l, ad, 5);",
     "if (!usable(b)) { fault(K_MBARRIER, l, ad, 5);"),
    # A copy arrives after somebody has waited for it in vain.
    ("if ((b.phase & 1) == par && !b.loads.empty()) { std::vector<Load> ls; ls.swap(b.loads); "
     "for (Load& L : ls) { b.tx -= tma_deliver(L, tick + 1); events++; } mb_check(b); }\n"
     "          bool ok = (b.phase & 1) != par; if (ok) { v |= 1u << l; if (w->ticks.size() <= b.tick) "
     "w->ticks.resize(b.tick + 64); w->ticks[b.tick] = true; }",
     "bool ok = (b.phase & 1) != par; if (!ok) { w->failed = events; if (!b.loads.empty()) deliver_loads(b); }\n"
     "          if (ok) { v |= 1u << l; merge(w->clock, b.done); }"),
    ("if (!b.valid || (b.iepoch == epoch && b.iwarp != wi)) { fault(K_MBARRIER, l, ad, 6); continue; }\n",
     "if (!usable(b)) { fault(K_MBARRIER, l, ad, 6); continue; }\n"
     "          if (W[b.iwarp].fence_seq <= b.fenced_after) fault(K_PROXY, l, ad, 8);\n"),
    ("tma_issue(L, l); b.loads.push_back(L);", "tma_issue(L, l); b.loads.push_back(L); if (eager) deliver_loads(b);"),
    # The four operations, and what a warp does after each.
    ("      case BRA: return 1;\n",
     "      case BRA: return 1;\n"
     "      case NAMEDBAR: case SETREGS: case JUMPTABLE: case MBARRIVE: return specialised(I, m, act);\n"),
    ("      if (r == 4) {\n",
     "      if (r == 6) { w->failed = events; return; }\n      if (r == 7) { w->pc = jump; continue; }\n"
     "      if (r == 8) { w->pc = pc + 1; w->state = 1; return; }\n      if (r == 4) {\n"),
    ("    while (!E.stop) {\n      u64 before", "    E.start();\n    while (!E.stop) {\n      u64 before"),
    ("if (idle > (order < 2 ? 4 : 2000000))", "E.eager = order == 1 || (order == 2 && rnd() % 2); (void)idle;\n"
                                               "        if (E.stuck())"),
    ("      if (done == num_warps) break;\n",
     "      if (done == num_warps) { E.ended(); break; }\n"
     "      E.pc = bpc; E.fault(K_DEADLOCK, 0, 0, bar); E.stop = true; break;\n"),
)


def _source(original: str) -> str:
    """The executor's emu.cpp with `MEMBERS` and these changes."""
    changes = (*_CHANGES, ("  // ---- shared memory\n", MEMBERS.read_text(encoding="utf-8")))
    for old, new in changes:
        if original.count(old) != 1:
            raise RuntimeError(f"the executor has changed: {old!r} is {original.count(old)} times in its emu.cpp")
        original = original.replace(old, new)
    return original


@lru_cache(maxsize=1)
def library(ptxemu) -> ctypes.CDLL:
    """Made of the source of the executor's module `ptxemu` with the changes; kept where that keeps its own."""
    source = _source((ptxemu.HERE / "emu.cpp").read_text(encoding="utf-8"))
    name = f"warp_specialised_{os.getuid()}_{hashlib.sha256(source.encode()).hexdigest()[:16]}.so"
    built = Path(os.environ.get("PTXEMU_CACHE", tempfile.gettempdir())) / name
    if not built.exists():
        with tempfile.TemporaryDirectory(dir=built.parent) as folder:
            path = Path(folder) / "emu.cpp"
            path.write_text(source, encoding="utf-8")
            subprocess.run(["g++", *ptxemu.FLAGS, "-o", f"{folder}/emu.so", str(path)], check=True)
            os.replace(f"{folder}/emu.so", built)
    return ctypes.CDLL(str(built))


@lru_cache(maxsize=1)
def decoder(ptxemu) -> type:
    """The executor's reader of PTX, which knows the operations, too."""
    class Decoder(ptxemu._Decoder):
        def run(self, body):
            self.tables, self.jumps = {}, []
            super().run(body)

        def statement(self, s):
            if s.startswith(".branchtargets"):
                self.tables[list(self.labels)[-1]] = [name.strip() for name in s.split(maxsplit=1)[1].split(",")]
            super().statement(s)

        def finish(self):
            for operands, table in self.jumps:
                operands += [self.labels[name] for name in self.tables[table]]
            super().finish()

        def do_brx(self, m, o, t):
            operands = [self.src(o[0], "r")]
            self.jumps.append((operands, o[1]))
            return "JUMPTABLE", {"a": operands}

        def do_bar(self, m, o, t):
            if m[1] == "warp":
                return super().do_bar(m, o, t)
            number, threads = [*map(self.immediate, o), 0][:2]
            return "NAMEDBAR", {"imm0": number, "imm1": threads}

        do_barrier = do_bar

        def do_setmaxnreg(self, m, o, t):
            return "SETREGS", {"imm0": self.immediate(o[0]), "imm1": int(m[1] == "inc")}

        def do_mbarrier(self, m, o, t):
            if m[1] != "arrive" or "expect_tx" in m:
                return super().do_mbarrier(m, o, t)
            base, offset = self.address(o[1], "r")
            return "MBARRIVE", {"a": [base, self.src(o[2] if len(o) > 2 else "1", "r")], "imm0": offset}
    return Decoder


@contextlib.contextmanager
def specialised(ptxemu) -> Iterator[None]:
    """Inside, `ptxemu` reads and runs kernels whose warps run different programs."""
    names = {name: len(ptxemu.OPS) + i for i, name in enumerate(OPERATIONS)}
    before = ptxemu.LIB, ptxemu._Decoder, ptxemu.OPS
    ptxemu.LIB, ptxemu._Decoder, ptxemu.OPS = library(ptxemu), decoder(ptxemu), {**ptxemu.OPS, **names}
    try:
        yield
    finally:
        ptxemu.LIB, ptxemu._Decoder, ptxemu.OPS = before
