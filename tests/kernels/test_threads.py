"""Calls from several threads at once, as with one thread for each GPU."""

import threading

import kernel_oracle as oracle
import torch

from liteattention.kernels import SkipMask, lite_attention


def test_calls_at_the_same_time_compute_what_they_compute_one_by_one(backend, place):
    inputs = [[x.to(place) for x in oracle.make(1, 2, 300, 300, 64, torch.float16, seed=seed)] for seed in (0, 1)]

    def call(seed, out):
        mask = SkipMask.full(1, 2, 300, device=place)
        barrier.wait()
        out[seed] = lite_attention(*inputs[seed], mask, threshold=-2.0, pool_skipped=True, backend=backend), mask.words

    alone, together, barrier = {}, {}, threading.Barrier(1)
    for seed in (0, 1):
        call(seed, alone)
    barrier = threading.Barrier(2)
    threads = [threading.Thread(target=call, args=(seed, together)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together.keys() == alone.keys()
    for seed in (0, 1):
        assert all(torch.equal(a, b) for a, b in zip(alone[seed], together[seed], strict=True))
