"""Threads that share the parts of one call, each with torch's operators on one thread.

A parallel operator ends when its slowest thread does. Attention by tiles is thousands of small operators, and on a
machine that does other things at the same time each of them waits for a thread that is not running: measured, 100 times
the quiet time. Here whole parts are spread over threads, which meet once, at the end of the call.

`torch.set_num_threads` holds for the thread that calls it and for threads that first use torch afterwards (OpenMP);
threads that used torch before keep their number. So a new worker sets one thread for itself and lets another thread put
back what later threads get.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache, lru_cache
from typing import TypeVar

import torch
from torch.amp import autocast, is_autocast_available

Part = TypeVar("Part")

_POLL_SECONDS = 0.1
"""Where waiting for a lock cannot be interrupted (Windows), Ctrl-C is seen after this time."""


def run_parts(make_worker: Callable[[], Callable[[Part], None]], parts: Iterable[Part], device: torch.device) -> None:
    """Compute every part once, in inference mode; returns when all are done.

    On a CPU as many parts at a time as the caller has torch threads; on other devices, or with one thread, one by one
    in the calling thread. Parts must not depend on each other: then the result does not depend on the number of
    threads. Calls from several threads share the workers.

    Args:
        make_worker: called once in each thread that takes part; what it returns computes one part.

    Raises:
        BaseException: what a part raised, or what interrupted the caller. No further part has been started then, and
            none is running.
    """
    pending = deque(parts)
    kind = device.type if is_autocast_available(device.type) else "cpu"

    def work() -> None:
        with torch.inference_mode(), autocast(kind, enabled=False):
            try:
                compute = make_worker()
                while pending:
                    try:
                        part = pending.popleft()
                    except IndexError:  # another worker has taken the last one
                        return
                    compute(part)
            finally:
                pending.clear()

    threads = torch.get_num_threads() if device.type == "cpu" and _threads_count_for_themselves() else 1
    if threads == 1:
        work()
        return
    executor, running = _executor(threads), []
    try:
        for _ in range(min(threads, len(pending))):
            running.append(executor.submit(work))
        while wait(running, _POLL_SECONDS).not_done:
            pass
    except BaseException:
        pending.clear()
        wait(running)
        raise
    for future in running:
        future.result()


@cache
def _threads_count_for_themselves() -> bool:
    """Whether each thread has its own number of torch threads: with OpenMP only."""
    return "ATen parallel backend: OpenMP" in torch.__config__.parallel_info()


@lru_cache(maxsize=4)
def _executor(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "liteattention", _use_one_thread)


_starting = threading.Lock()


def _use_one_thread() -> None:
    """In a new thread: one torch thread for it, for later threads what they would have got."""
    with _starting:
        default = torch.get_num_threads()  # and first, or torch would set it at the first operator
        torch.set_num_threads(1)
        restore = threading.Thread(target=torch.set_num_threads, args=(default,))
        restore.start()
        restore.join()


def _after_fork() -> None:
    """The child has none of its parent's threads."""
    global _starting
    _starting = threading.Lock()
    _executor.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
