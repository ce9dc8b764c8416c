"""What the server sends to the node while a run goes on: message and text, and nothing that could end the run."""

import sys
import types

import pytest
import torch

from liteattention.host import progress
from liteattention.runtime import RunHandle, StepReport


class Server:
    """ComfyUI's server, as far as it is used, while it executes prompt "now" of workflow "w"."""

    client_id, last_prompt_id = "window", "now"

    def __init__(self):
        self.messages, self.texts = [], []
        extra = {"extra_pnginfo": {"workflow": {"id": "w"}}}
        self.prompt_queue = types.SimpleNamespace(currently_running={
            0: (0, "another", {}, {}, []), 1: (1, "now", {}, extra, [], {})})

    def send_sync(self, event, data, sid):
        assert (event, sid) == (progress.EVENT, "window")
        self.messages.append(data)

    def send_progress_text(self, text, node_id):
        self.texts.append((node_id, text))


@pytest.fixture
def server(monkeypatch):
    running = Server()
    monkeypatch.setitem(sys.modules, "server",
                        types.SimpleNamespace(PromptServer=types.SimpleNamespace(instance=running)))
    return running


def test_steps_and_summary_reach_the_node(kit, server, monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL_S", 0)
    handle = RunHandle()
    kit.sample(kit.lite(handle=handle, node_id="5:7"))
    assert len(server.messages) == 5
    for number, message in enumerate(server.messages[:4], 1):
        assert (message["node"], message["workflow"], message["total"]) == ("5:7", "w", 4)
        assert message["state"] == "running" and message["lines"][0].startswith(f"step {number}/4 (")
        assert len(message["steps"]) == number
    last, summary = server.messages[4], handle.summary
    assert last["lines"] == summary.lines() and last["state"] in ("on", "slower") and last["total"] == 4
    assert [dense for _, dense in last["steps"]] == [True, False, False, False]
    assert [share for share, _ in last["steps"]] == pytest.approx(summary.skipped_per_step, abs=1e-3)
    # A frontend without the script has the same as text.
    assert server.texts == [("5:7", "\n".join(message["lines"])) for message in server.messages]


@pytest.mark.parametrize("settings, state", [({"dense_blocks": "0--1"}, "off"), ({}, "on")])
def test_the_state_is_that_of_the_run(kit, server, settings, state):
    handle = RunHandle()
    kit.sample(kit.lite(handle=handle, node_id="7", **settings))
    slower = handle.summary.speed_up is not None and handle.summary.speed_up < 1
    assert server.messages[-1]["state"] == ("slower" if state == "on" and slower else state)


def test_steps_that_come_too_fast_are_drawn_with_the_next_one(server):
    times = iter([0.0, 0.1, 0.2, 0.6])
    display = progress.NodeDisplay("7", clock=lambda: next(times))
    for step, skipped in ((1, 0.0), (2, 0.25), (4, None), (5, 0.5)):
        display.step(StepReport(step, 8, skipped, 0.2, 0, "warm-up" if step == 1 else "sparse"))
    assert [message["steps"] for message in server.messages] == [
        [(0.0, True)], [(0.0, True), (0.25, False), (None, False), (None, False), (0.5, False)]]


def broken(*args):
    raise ConnectionError


@pytest.mark.parametrize("missing", ["send_sync", "send_progress_text", "prompt_queue", "last_prompt_id", None])
def test_a_server_that_fails_ends_no_render_and_stops_nothing_else(kit, server, monkeypatch, missing):
    if missing is None:
        monkeypatch.delitem(sys.modules, "server")
    else:
        monkeypatch.setattr(server, missing, broken if missing.startswith("send") else None)
    assert torch.isfinite(kit.sample(kit.lite(node_id="7"))).all()
    assert bool(server.texts) is (missing not in ("send_progress_text", None))
    assert bool(server.messages) is (missing not in ("send_sync", None))
