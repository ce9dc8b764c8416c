"""Text on the node, and what is known of the prompt, where a server runs."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable
from typing import Any

log = logging.getLogger("LiteAttention")

INTERVAL_S = 0.25
"""Seconds between two texts of a run at least: steps of small models come faster than anybody reads."""


def show(text: str, node_id: str | None) -> None:
    """Show `text` on the node. Never raises: a missing server or a closed connection must not end a render."""
    if node_id is None:
        return
    try:
        from server import PromptServer

        server = getattr(PromptServer, "instance", None)
        if server is not None:
            server.send_progress_text(text, node_id)
    except Exception as error:
        log.debug("LiteAttention: no progress text: %s", error)


class Ticker:
    """Shows the texts of one run on its node, at most one every INTERVAL_S."""

    def __init__(self, node_id: str | None, clock: Callable[[], float] = time.monotonic):
        self._node_id = node_id
        self._clock = clock
        self._shown = -math.inf

    def show(self, text: Callable[[], str]) -> None:
        """Show the result of `text`, unless another text has just been shown."""
        now = self._clock()
        if now - self._shown >= INTERVAL_S:
            self._shown = now
            show(text(), self._node_id)


def prompt_id() -> str | None:
    """Identity of the prompt that the server executes, or None without a server."""
    server = getattr(sys.modules.get("server"), "PromptServer", None)
    return getattr(getattr(server, "instance", None), "last_prompt_id", None)


def is_continued(prompt: Any, node_id: str | None) -> bool:
    """Whether a node of `prompt` (ComfyUI's DynamicPrompt, or None) goes on with the runs of node `node_id`."""
    if prompt is None:
        return False
    links = [prompt.get_node(other)["inputs"].get("continue_from") for other in prompt.all_node_ids()]
    return any(isinstance(link, list) and link[:1] == [node_id] for link in links)
