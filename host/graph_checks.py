"""What is seen before anything runs: nodes that no sampler uses, and a second copy of the pack."""

from __future__ import annotations

import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

from ..runtime import words
from . import progress
from .compat import server
from .language import language

log = logging.getLogger("LiteAttention")

NODE = "LiteAttention"
"""Node id of the node that patches models; those of the pack's other nodes start with it."""
NOT_SAMPLED_NOTE = "off: no sampler uses this model output; connect it to the sampler"
REPLACED_NOTE = "off: a LiteAttention node after this one replaces it; remove one of the two"
TWICE_NOTE = "LiteAttention is installed twice; remove one of the two folders"

_PASSED_ON = {"MODEL", "GUIDER"}
_OTHER = {"CLIP", "VAE", "CONDITIONING", "CLIP_VISION", "CONTROL_NET", "SIGMAS", "SAMPLER", "NOISE", "MASK", "STRING",
          "INT", "FLOAT", "BOOLEAN", "COMBO"}
"""Types that no sampling comes out of. Latents, images, pipes and whatever else could be what was sampled."""


def unsampled(prompt: dict, outputs: Callable[[str], Iterable[str] | None]) -> dict[str, str]:
    """Node id: what to say, of each LiteAttention node of a prompt in API format whose model no sampler gets.

    Args:
        outputs: types of a node class's outputs in order, or None for an unknown class.

    Where a node could be a sampler, it is taken for one: a wrong complaint is worse than none.
    """
    readers = defaultdict(list)
    for node_id, node in prompt.items():
        for value in node.get("inputs", {}).values():
            if isinstance(value, list) and len(value) == 2 and isinstance(value[1], int):
                readers[str(value[0]), value[1]].append(node_id)
    found = {node_id: _complaint(prompt, outputs, readers, node_id)
             for node_id, node in prompt.items() if node.get("class_type") == NODE}
    return {node_id: text for node_id, text in found.items() if text}


def _complaint(prompt: dict, outputs: Callable[[str], Iterable[str] | None], readers: dict, start: str) -> str:
    replaced, seen, todo = False, set(), list(readers[start, 0])
    while todo:
        node_id = todo.pop()
        kind = prompt.get(node_id, {}).get("class_type", "")
        if node_id in seen:
            continue
        seen.add(node_id)
        if kind.startswith(NODE):
            replaced |= kind == NODE
            continue
        types = outputs(kind)
        if types is None or {*types} - _PASSED_ON - _OTHER:
            return ""
        todo += [reader for slot, name in enumerate(types) if name in _PASSED_ON for reader in readers[node_id, slot]]
    return REPLACED_NOTE if replaced else NOT_SAMPLED_NOTE


def _outputs(kind: str) -> Iterable[str] | None:
    """Of a node class that this ComfyUI has loaded."""
    types = getattr(_loaded_nodes().get(kind), "RETURN_TYPES", None)
    return None if types is None else [str(name) for name in types]  # some are lists of choices


def _loaded_nodes() -> dict[str, type]:
    return getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {})


def watch_prompts() -> None:
    """Say of every prompt that is queued which of its LiteAttention nodes do nothing: those may never be executed."""
    running = server()
    if running is not None:
        running.add_on_prompt_handler(_tell)


def _tell(request: dict) -> dict:
    """ComfyUI's handler of a queued prompt. Never raises, changes nothing."""
    try:
        workflow = progress.workflow_id(request.get("extra_data") or {})
        for node_id, text in unsampled(request.get("prompt") or {}, _outputs).items():
            log.warning("LiteAttention: node %s: %s", node_id, text)
            progress.show(node_id, [words(language())(text)], workflow, request.get("client_id"))
    except Exception as error:
        log.debug("LiteAttention: this prompt is not understood: %s", error)
    return request


def warn_of_second_copy() -> None:
    """To be called before this copy's nodes are known to ComfyUI."""
    other = getattr(_loaded_nodes().get(NODE), "RELATIVE_PYTHON_MODULE", None)
    if other is not None:
        log.warning("%s: %s, and %s, which is used", TWICE_NOTE, other.rpartition(".")[2],
                    Path(__file__).parents[1].name)
