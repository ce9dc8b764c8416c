"""Text on the node, where a server runs."""

from __future__ import annotations

import logging

log = logging.getLogger("LiteAttention")


def show(text: str, node_id: str | None) -> None:
    """Show `text` on the node. Never raises: a missing server or a closed socket is no reason to lose a render."""
    if node_id is None:
        return
    try:
        from server import PromptServer

        server = getattr(PromptServer, "instance", None)
        if server is not None:
            server.send_progress_text(text, node_id)
    except Exception as error:
        log.debug("LiteAttention: no progress text: %s", error)
