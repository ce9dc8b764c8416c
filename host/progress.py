"""What a run shows on its node, and what is known of the prompt, where a server runs."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..runtime import Phase, RunSummary, StepReport, words
from .compat import server
from .language import language

log = logging.getLogger("LiteAttention")

EVENT = "liteattention.run"
"""Message to the pack's script (web/liteattention.js), which shows chart and lines; other frontends ignore it."""
INTERVAL_S = 0.25
"""Seconds between two messages of a run at least: steps of small models come faster than anybody reads."""

Step = tuple[float | None, bool]
"""(share of a step's attention that was skipped, 0..1, None where none ran; whether it was to compute everything)."""


class NodeDisplay:
    """Shows one run on its node: at most one step every INTERVAL_S, and the summary.

    Nothing here raises or waits for a device: a missing server or a closed connection must not end a render.
    """

    def __init__(self, node_id: str | None, clock: Callable[[], float] = time.monotonic):
        self._node_id = node_id
        self._workflow, self._language = running_workflow(), language()
        self._clock = clock
        self._shown = -math.inf
        self._steps: dict[int, Step] = {}

    def say(self, text: str) -> None:
        """A line before the first step."""
        self._show("running", [words(self._language)(text)])

    def step(self, report: StepReport) -> None:
        """A finished step. All of them are drawn, also those that come too fast to be shown at once."""
        self._steps[report.step] = (None if report.skipped is None else round(report.skipped, 3),
                                    report.phase != Phase.SPARSE.value)
        now = self._clock()
        if now - self._shown >= INTERVAL_S:
            self._shown = now
            self._show("running", report.lines(self._language), report.total_steps)

    def finish(self, summary: RunSummary) -> None:
        """The end of the run, however it came."""
        state = "off" if not summary.sparse_calls else "slower" if summary.slower else "on"
        self._show(state, summary.lines(self._language), summary.total_steps)

    def _show(self, state: str, lines: list[str], total: int = 0) -> None:
        steps = [self._steps.get(step, (None, False)) for step in range(1, max(self._steps, default=0) + 1)]
        show(self._node_id, lines, self._workflow, state=state, total=total, steps=steps)


def show(node_id: str | None, lines: list[str], workflow: str | None, client_id: str | None = None, *,
         state: str = "off", total: int = 0, steps: Sequence[Step] = ()) -> None:
    """Show lines and chart on a node, in the frontend that has queued the prompt. Never raises.

    Args:
        node_id: e.g. "5:3" for node 3 in the subgraph node 5; None: nowhere.
        workflow: id of the workflow that the node is in.
        client_id: the frontend; None: that of the prompt that is executed.
        state: "running", "on", "slower" (on, and slower than dense) or "off".
        total: steps of the run, 0 without one. steps: the finished ones.
    """
    if node_id is None:
        return
    message = {"node": node_id, "workflow": workflow, "state": state, "lines": lines, "total": total, "steps": steps}
    # The message first: the script then has its widget, and the frontend makes none of its own for the text.
    _to_server(lambda server: server.send_sync(EVENT, message, client_id or getattr(server, "client_id", None)))
    _to_server(lambda server: server.send_progress_text("\n".join(lines), node_id))


def _to_server(send: Callable[[Any], None]) -> None:
    try:
        running = server()
        if running is not None:
            send(running)
    except Exception as error:
        log.debug("LiteAttention: nothing shown on the node: %s", error)


def prompt_id() -> str | None:
    """Identity of the prompt that the server executes, or None without a server."""
    return getattr(server(), "last_prompt_id", None)


def running_workflow() -> str | None:
    """Id of the workflow whose prompt the server executes; None without a server, or for a prompt without one.

    Asked for at the start of a run and not by the node: a cached node can be of another workflow.
    """
    try:
        running = list(server().prompt_queue.currently_running.values())
        return next((workflow_id(extra) for _, name, _, extra, *_ in running if name == prompt_id()), None)
    except Exception:
        return None


def workflow_id(extra_data: dict) -> str | None:
    """Id of the workflow that a prompt was made from, from what the frontend has sent beside the prompt."""
    return ((extra_data.get("extra_pnginfo") or {}).get("workflow") or {}).get("id")


def is_continued(prompt: Any, node_id: str | None) -> bool:
    """Whether a node of `prompt` (ComfyUI's DynamicPrompt, or None) goes on with the runs of node `node_id`."""
    if prompt is None:
        return False
    links = [prompt.get_node(other)["inputs"].get("continue_from") for other in prompt.all_node_ids()]
    return any(isinstance(link, list) and link[:1] == [node_id] for link in links)
