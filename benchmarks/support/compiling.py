"""Variants compiled in child processes: in parallel, and so that a compiler that aborts ends a child only."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable

from support.variants import AMD, NVIDIA, Variant, all_variants, compile_variant, config_of

STOP_AFTER = 300.0
"""Seconds for one variant; the slowest takes 6 on an idle core."""


def compile_all(script: str, wanted: Iterable[Variant], jobs: int = 2,
                done: Callable[[Variant, dict], None] = lambda variant, row: None) -> dict[Variant, dict]:
    """Figures of each variant, see `support.sass.metrics`; `problem` in place of figures where it does not compile.

    Args:
        script: the file that calls `serve` when it is started with --serve.
        done: told each row as it comes, from several threads.
    """
    wanted = list(wanted)
    todo: queue.SimpleQueue[Variant] = queue.SimpleQueue()
    for variant in wanted:
        todo.put(variant)
    rows: dict[Variant, dict] = {}

    def work() -> None:
        child = None
        while True:
            try:
                variant = todo.get_nowait()
            except queue.Empty:
                break
            if child is None or child.poll() is not None:
                child = _child(script)
            rows[variant] = _ask(child, variant)
            done(variant, rows[variant])
        if child is not None:
            child.stdin.close()
            child.wait()
            child.stdout.close()

    threads = [threading.Thread(target=work) for _ in range(min(jobs, len(wanted)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {variant: rows[variant] for variant in wanted}


def _child(script: str) -> subprocess.Popen:
    # Triton decides at import whether it interprets, and the tests may be running in its interpreter.
    without = ("TRITON_INTERPRET", "TRITON_KERNEL_OVERRIDE", "TRITON_KERNEL_DUMP")
    environment = {name: value for name, value in os.environ.items() if name not in without}
    return subprocess.Popen([sys.executable, script, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            stderr=subprocess.DEVNULL, text=True, env={**environment, "OMP_NUM_THREADS": "1"})


def _ask(child: subprocess.Popen, variant: Variant) -> dict:
    timer = threading.Timer(STOP_AFTER, child.kill)
    timer.start()
    try:
        child.stdin.write(variant.name + "\n")
        child.stdin.flush()
        answer = child.stdout.readline()
    except BrokenPipeError:
        answer = ""
    finally:
        timer.cancel()
    if answer:
        return json.loads(answer)
    return {"problem": f"the compiler ended its process, status {child.wait()}"}


def serve() -> None:
    """In a child: a variant's name per line in, its figures per line out."""
    from support.report import plain
    from support.sass import metrics

    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever the compiler prints is no answer
    known = {variant.name: variant for arch in (*NVIDIA, *AMD) for variant in all_variants(arch)}
    for line in sys.stdin:
        variant = known[line.rstrip("\n")]
        try:
            row = {"launch": launch_text(config_of(variant), variant), **metrics(*compile_variant(variant))}
        except Exception as error:  # a variant that does not compile is a row like others
            row = {"problem": plain(error)}
        print(json.dumps(row), file=answers, flush=True)


def launch_text(config, variant: Variant) -> str:
    """"128x64 w8 s2 registers": compute tile, warps, stages, where decisions are recorded; "" for other kernels."""
    if variant.kernel != "attention":
        return ""
    return (f"{config.BLOCK_M}x{config.BLOCK_N} w{config.num_warps} s{config.num_stages}"
            + (" registers" if config.record_in_registers else " tile"))
