"""Compile the shipped launch table for GPUs that are not here, and print what the machine code holds.

    python benchmarks/static.py [--arch sm_89 sm_90] [--json FILE]

Needs Triton (Linux) and no GPU. Columns: registers per thread, spilled bytes, shared memory, asynchronous copies and
tensor instructions in the whole kernel, assembler notes about serialised wgmma. Exit status 1 if a variant spills
more than SPILL_LIMIT, exceeds its GPU's shared memory, or reads only and yet holds an atomic.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
from load_pack import load_pack  # noqa: E402

load_pack()
import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from liteattention.kernels.launch import LaunchConfig, launch_config  # noqa: E402
from liteattention.kernels.triton_attention import attention_kernel  # noqa: E402
from liteattention.kernels.triton_expand import expand_kernel  # noqa: E402

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100", "gfx1201")
TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
# float32 runs as three TF32 products; sm_90 spills a word or two around its ragged loop, gfx1100 in its only form.
SPILL_LIMIT = {"float32": 128, "bfloat16": 72, "": 0}
SHARED_LIMIT_KB = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99,
                   "gfx942": 64, "gfx1100": 64, "gfx1201": 64}


def compile_kernel(kernel, signature: dict, constants: dict, arch: str, num_warps: int, num_stages: int):
    """The compiled kernel for `arch`; pointers and strides are taken as divisible by 16, as they are in use."""
    divisible = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names)
        if signature.get(name, "").startswith("*") or name.startswith("stride_")
    }
    full = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=full, constexprs={(kernel.arg_names.index(k),): v
                                                             for k, v in constants.items()}, attrs=divisible)
    target = GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget(
        "hip", arch, 64 if arch.startswith("gfx9") else 32)
    return triton.compile(source, target=target, options={"num_warps": num_warps, "num_stages": num_stages})


def attention_variant(arch: str, dtype: torch.dtype, head_dim: int, record: bool, ragged: bool,
                      config: LaunchConfig | None = None):
    """Compile one attention variant as `triton_attention` would launch it."""
    config = config or launch_config(arch, head_dim, dtype)
    signature = {f"{x}_ptr": TYPES[dtype] for x in ("q", "k", "v", "out")}
    signature |= {"lse_ptr": "*fp32", "rows_ptr": "*i64", "list_ptr": "*i16", "count_ptr": "*i32",
                  "qk_scale": "fp32", "threshold": "fp32"}
    signature |= {name: "i32" for name in attention_kernel.arg_names
                  if name.startswith("stride_") or name in ("n_heads", "seqlen_q", "seqlen_k", "q_tiles", "k_tiles",
                                                            "row_words", "list_stride")}
    d_main = 64 if head_dim == 96 else head_dim
    constants = {"TILE": 128, "BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N, "D_MAIN": d_main,
                 "D_TAIL": head_dim - d_main, "RAGGED": ragged, "RECORD": config.record if record else 0,
                 "HAS_LSE": False, "PRECISION": "tf32x3" if dtype == torch.float32 else "ieee",
                 "NUM_STAGES": config.num_stages}
    return compile_kernel(attention_kernel, signature, constants, arch, config.num_warps, config.num_stages), config


def expand_variant(arch: str, chunk: int):
    """Compile the recording expansion kernel."""
    signature = {"rows_ptr": "*i64", "must_ptr": "*i32", "list_ptr": "*i16", "count_ptr": "*i32", "n_heads": "i32",
                 "q_tiles": "i32", "k_tiles": "i32", "row_words": "i32", "list_stride": "i32"}
    constants = {"HAS_MASK": True, "HAS_MUST": True, "RAGGED": True, "REWRITE": True, "CHUNK": chunk}
    return compile_kernel(expand_kernel, signature, constants, arch, 4, 2)


def inspect(compiled, arch: str) -> dict:
    """Registers, spills and instruction counts of a compiled kernel, from the assembler's own report."""
    if arch.startswith("gfx"):
        code = compiled.asm["amdgcn"]
        return {
            "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", code).group(1)),
            "spill_bytes": 4 * int(re.search(r"\.vgpr_spill_count:\s+(\d+)", code).group(1)),
            "shared_kb": round(compiled.metadata.shared / 1024, 1), "async_copies": 0,
            "tensor_ops": len(re.findall(r"v_mfma|v_wmma", code)),
            "atomics": len(re.findall(r"(?:global|flat|buffer)_atomic", code)), "serialised": False,
        }
    ptx = compiled.asm["ptx"]
    target = re.search(r"\.target (sm_\w+)", ptx).group(1)
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    blackwell = folder / "ptxas-blackwell"
    assembler = blackwell if blackwell.exists() and int(arch[3:]) >= 100 else folder / "ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
        source.write(ptx)
        source.flush()
        said = subprocess.run([assembler, "-v", f"--gpu-name={target}", source.name, "-o", "/dev/null"],
                              capture_output=True, text=True, check=True).stderr
    stores, loads = map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said).groups())
    return {
        "registers": int(re.search(r"Used (\d+) registers", said).group(1)),
        "spill_bytes": stores + loads,
        "shared_kb": round(compiled.metadata.shared / 1024, 1),
        "async_copies": len(re.findall(r"cp\.async\.c[ag]|cp\.async\.bulk", ptx)),
        "tensor_ops": len(re.findall(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma", ptx)),
        "atomics": len(re.findall(r"\b(?:atom|red)\.", ptx)),
        "serialised": bool(re.search(r"C75\d\d", said)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args()
    rows, bad = [], 0
    for arch in args.arch:
        variants = [(d, dtype, record, True) for d in (64, 96, 128) for dtype in (torch.bfloat16,)
                    for record in (False, True)]
        if arch.startswith("sm_"):
            variants.append((128, torch.float32, True, True))
        for head_dim, dtype, record, ragged in variants:
            compiled, config = attention_variant(arch, dtype, head_dim, record, ragged)
            row = {"arch": arch, "kernel": "attention", "head_dim": head_dim, "dtype": str(dtype)[6:],
                   "record": config.record if record else 0,
                   "tile": f"{config.BLOCK_M}x{config.BLOCK_N} w{config.num_warps} s{config.num_stages}",
                   **inspect(compiled, arch)}
            rows.append(row)
        rows.append({"arch": arch, "kernel": "expand", "head_dim": "", "dtype": "", "record": "", "tile": "w4",
                     **inspect(expand_variant(arch, 32), arch)})
    header = list(rows[0])
    print(" ".join(f"{name:>12}" for name in header))
    for row in rows:
        reads_only = row["kernel"] == "attention" and row["record"] == 0
        row_bad = (row["spill_bytes"] > SPILL_LIMIT[row["dtype"]] or row["shared_kb"] > SHARED_LIMIT_KB[row["arch"]]
                   or (reads_only and row["atomics"] > 0))
        bad += row_bad
        print(" ".join(f"{row[name]!s:>12}" for name in header), "<- outside limits" if row_bad else "")
    if args.json:
        args.json.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1), encoding="utf-8")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
