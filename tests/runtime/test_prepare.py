"""What a process does before a run that others wait for."""

import sys
from dataclasses import replace

import pytest
import torch

from liteattention.runtime import ErrorBudget, LiteAttentionConfig, Threshold
from liteattention.runtime.prepare import prepare

module = sys.modules[prepare.__module__]
CPU = torch.device("cpu")


@pytest.mark.parametrize("rule, criterion", [(ErrorBudget(), "mass"), (Threshold(), "max")])
def test_the_kernel_runs_as_the_run_will_call_it(monkeypatch, rule, criterion):
    calls, kernel = [], module.lite_attention
    monkeypatch.setattr(module, "lite_attention", lambda *q, **given: calls.append((q, given)) or kernel(*q, **given))
    config = LiteAttentionConfig(rule=rule, pool_skipped=False)
    assert prepare(config, CPU, 64, torch.float32) == "torch"
    assert len(calls) == 2, "forward and backward"
    for (q, *_), given in calls:
        assert q.shape[-1] == 64 and q.dtype == torch.float32 and given["criterion"] == criterion
        assert given["pool_skipped"] is False and given["precision"] == "full" and given["backend"] == "torch"


def test_every_precision_that_a_run_may_choose_is_compiled(monkeypatch):
    used, choice = [], module.precision_choice
    monkeypatch.setattr(module, "precision_choice", lambda *given: replace(choice(*given), name="int8"))
    monkeypatch.setattr(module, "lite_attention", lambda *q, **given: used.append(given["precision"]))
    prepare(LiteAttentionConfig(), CPU, 64, torch.float32)
    assert used == ["full", "full", "int8", "int8"]


def test_a_kernel_that_fails_fails_in_the_run_where_it_is_noted(monkeypatch, caplog):
    def broken(*q, **given):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(module, "lite_attention", broken)
    assert prepare(LiteAttentionConfig(), CPU, 64, torch.float32) == "torch"
    assert "no kernel image" in caplog.text


def test_nothing_is_compiled_where_no_backend_runs(monkeypatch):
    def refused(device, requested=None):
        raise ValueError("LITEATTENTION_BACKEND")

    monkeypatch.setattr(sys.modules["liteattention.runtime.compute"], "resolve_backend", refused)
    monkeypatch.setattr(module, "lite_attention", None)
    assert prepare(LiteAttentionConfig(), CPU, 64, torch.float32) is None
