"""Sequence parallelism by heads (Ulysses): every process decides for its own heads what one process decides for all."""

import functools
import multiprocessing

import pytest
import torch
import torch.distributed as dist
import ulysses_kit
from ulysses_kit import HEADS, LAYERS, ROWS, RULES, STEPS, Case

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo")

CASES = [*(Case(rule, 640) for rule in RULES), Case("mass, pooled", 701)]
"""701 tokens are padded to 702 and 704."""


@pytest.fixture(scope="module", params=[2, 4])
def played(request, tmp_path_factory):
    """What each process has played, by case."""
    by_rank = ulysses_kit.processes([CASES] * request.param, tmp_path_factory.mktemp("processes"))
    return dict(zip(CASES, zip(*by_rank, strict=True), strict=True))


alone = functools.cache(ulysses_kit.play)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_processes_decide_together_what_one_decides_alone(played, case):
    ranks = played[case]
    parts = len(ranks)
    one = alone(case, case.padded(parts))
    assert (torch.cat([rank.latent for rank in ranks], 1) - one.latent).abs().max() < 1e-6
    assert one.masks.keys() == {(f"block {layer}", row) for layer in range(LAYERS) for row in ROWS}
    for name, mask in one.masks.items():
        assert 0 < mask.float().mean() < 1
        assert torch.equal(torch.cat([rank.masks[name] for rank in ranks], 1), mask)
    assert sum(rank.tiles_computed for rank in ranks) == one.tiles_computed < one.tiles_total
    assert sum(rank.tiles_total for rank in ranks) == one.tiles_total
    for rank in ranks:
        assert rank.mask_bytes * parts == one.mask_bytes
        assert rank.sparse_calls == one.sparse_calls == LAYERS * STEPS and not rank.dense_calls
        assert next(iter(rank.masks.values())).shape[1] * parts == HEADS and not rank.notes
    assert len({rank.skipped for rank in ranks}) > 1, "heads differ, or exchanged heads would go unnoticed"


def test_no_process_outlives_one_that_fails(tmp_path):
    waits, fails = [Case("max", 640)], [Case("no such rule", 640)]
    with pytest.raises(RuntimeError, match="KeyError: 'no such rule'"):
        ulysses_kit.processes([waits, fails], tmp_path)
    assert not multiprocessing.active_children()
