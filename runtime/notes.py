"""What is worth a line in the run summary, each said once."""

from __future__ import annotations

import logging
import threading

log = logging.getLogger("LiteAttention")


class Notes:
    """Notes of a run. One about single layers is gathered: the log has its first layer, the summary how many there are.

    Locked, because several devices may report at once.
    """

    def __init__(self) -> None:
        self._notes: dict[str, dict[str, None]] = {}
        self._lock = threading.Lock()

    def add(self, text: str, layer: str | None = None) -> None:
        """A sentence for the user; `layer`: display name of the layer it is about."""
        with self._lock:
            known = text in self._notes
            self._notes.setdefault(text, {}).update({layer: None} if layer is not None else {})
        if not known:
            log.warning("LiteAttention: %s%s", f"layer {layer}: " if layer is not None else "", text)

    def lines(self) -> list[str]:
        """In the order of their first mention."""
        with self._lock:
            return [_line(text, list(layers)) for text, layers in self._notes.items()]


def _line(text: str, layers: list[str]) -> str:
    if not layers:
        return text
    return f"layer {layers[0]}: {text}" if len(layers) == 1 else f"{len(layers)} layers: {text}"
