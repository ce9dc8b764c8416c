"""The command that measures LiteAttention together with a step cache, and the table that quotes it."""

import json
from itertools import product

import pytest


@pytest.fixture
def caches(script):
    return script("caches")


def test_the_page_quotes_the_committed_result(caches):
    result = caches.ROOT / "benchmarks" / "results" / "2026-11-21-caches.json"
    rows = json.loads(result.read_text(encoding="utf-8"))["rows"]
    assert {(row["case"], row["reuse_threshold"], row["error_budget"]) for row in rows} == set(
        product(range(len(caches.CASES)), caches.REUSE, caches.BUDGETS))
    assert caches.table(rows) in (caches.ROOT / "docs" / "questions.md").read_text(encoding="utf-8")


def test_the_graph_has_what_is_compared_and_nothing_else(caches):
    for reuse, budget in product(caches.REUSE, caches.BUDGETS):
        graph = caches.prompt(caches.CASES[1], reuse, budget)
        kinds = [node["class_type"] for node in graph.values()]
        assert ("EasyCache" in kinds) == (reuse is not None)
        lite = next(node["inputs"] for node in graph.values() if node["class_type"] == "LiteAttention")
        assert (lite["dense_blocks"] == "0--1") == (budget is None)
        assert graph[lite["model"][0]]["class_type"] == ("ModelSamplingSD3" if reuse is None else "EasyCache")
        assert graph["6"]["inputs"]["seed"] == 7 and graph["4"]["inputs"]["shape"] == "square"
