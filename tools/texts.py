"""The English texts of a run that locales/*/summary.json translates, read from the source.

Lines are the templates that are given to `say`. Sentences that arrive finished (notes, reasons, advice, errors of
Triton) are strings of `PLACES` and of calls that add a note; what an f-string fills in becomes {0}, {1} and so on.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from string import Formatter

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kernels", "runtime", "host", "host/raylight", "report", "nodes")
ADDS_A_NOTE = re.compile(r"(?:.*notes\.add|self\._note)$")
PLACES = {
    "runtime/compute.py": ("SparseAttention.describe",),
    "runtime/masks.py": ("RESIZED", "SIZE_CHANGED", "NO_MATCH", "CarriedMasks.find"),
    "runtime/merged_summary.py": ("_notes",),
    "runtime/notes.py": ("_line",),
    "runtime/rules.py": ("_FEWER_STEPS", "ErrorBudget.bolder", "Threshold.bolder"),
    "runtime/run.py": ("NO_RUN", "NOT_FINISHED", "SEVERAL", "NOTHING", "LOST"),
    "runtime/schedule.py": ("NO_STEP_LEFT", "RECORDS_ONLY", "Phase", "StepPlan.describe"),
    "runtime/summary.py": ("NOT_REACHED", "advise"),
    "host/attach.py": ("STARTING", "OFF_HERE", "_dense_by"),
    "host/compat.py": ("_NAMES", "faster_dense"),
    "host/interop.py": ("NO_CALL", "NO_SELF_ATTENTION", "unreached"),
    "host/raylight/doors.py": ("choose",),
    "host/raylight/worker.py": ("NO_SELF_ATTENTION", "ANOTHER_WAY", "_unreached"),
    "nodes/report.py": ("NOT_ON_MODEL", "NO_RUN"),
    "kernels/compiler_trouble.py": ("_PORTABLE", "_KNOWN"),
    "kernels/precision.py": ("precision_on",),
    "kernels/triton_probe.py": ("triton_verdict", "_device_verdict", "_problem", "install_hint"),
}
"""Definitions all of whose strings with a space in them are texts; so are those of constants named ..._NOTE."""
WORDS = ("cross-attention", "warm-up", "recording", "sparse", "table", "measured")
"""Texts without a space."""


def run_texts() -> set[str]:
    """Every English template that a run can show."""
    found = {*WORDS, *_reasons()}
    for path in (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        places = PLACES.get(path.relative_to(ROOT).as_posix(), ())
        nodes = [_definition(tree, place) for place in places] + [
            node.value for node in tree.body if isinstance(node, ast.Assign)
            and getattr(node.targets[0], "id", "").endswith("_NOTE")] + [
            call.args[0] for call in ast.walk(tree)
            if isinstance(call, ast.Call) and call.args and ADDS_A_NOTE.match(ast.unparse(call.func))]
        found |= {text for node in nodes for text in _strings(node) if " " in text.strip()}
        found |= {text for call in ast.walk(tree) if isinstance(call, ast.Call)
                  and getattr(call.func, "id", "") == "say" for text in _strings(call.args[0])}
    return {text for text in found if not re.fullmatch(r"[{\d}., :]*", text)} | {", ", " and "}


def placeholders(template: str) -> list[str]:
    """The names in a template's braces, in alphabetical order."""
    return sorted(name for _, name, _, _ in Formatter().parse(template) if name is not None)


def _reasons() -> Iterator[str]:
    """Texts and hints of reasons, and the meanings of those that a note tells."""
    tree = ast.parse((ROOT / "runtime" / "reasons.py").read_text(encoding="utf-8"))
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        named = {keyword.arg: keyword.value for keyword in call.keywords}
        if getattr(call.func, "id", "") in ("Reason", "replace"):
            shown = [*call.args[:1], named.get("text"), named.get("hint")]
            yield from (text for node in shown if node is not None for text in _strings(node)
                        if " " in text and "…" not in text)
    for name in ("FRAME_BY_FRAME", "CACHED_KEYS", "RING", "PIPEFUSION", "CUT_APART"):
        yield from (text for text in _strings(_definition(tree, name)) if " " in text)
    api = ast.parse((ROOT / "kernels" / "api.py").read_text(encoding="utf-8"))
    for call in (node for node in ast.walk(api) if isinstance(node, ast.Call)):
        if getattr(call.func, "id", "") == "no":
            yield from _strings(call.args[-1])


def _definition(tree: ast.AST, name: str) -> ast.AST:
    """What a name of a module, or of a class in it, is bound to."""
    for part in name.split("."):
        tree = next(node for node in tree.body if getattr(node, "name", None) == part or (
            isinstance(node, ast.Assign) and any(getattr(target, "id", None) == part for target in node.targets)))
    return tree


def _strings(node: ast.AST) -> Iterator[str]:
    """The strings in a piece of source, but for docstrings, errors, patterns and keys of dicts."""
    if isinstance(node, ast.JoinedStr):
        numbers = iter(range(len(node.values)))
        yield "".join(part.value if isinstance(part, ast.Constant) else f"{{{next(numbers)}}}" for part in node.values)
        for part in node.values:
            yield from () if isinstance(part, ast.Constant) else _strings(part.value)
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            yield node.value.replace("{}", "{0}")
    elif not isinstance(node, ast.Raise) and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
        parts = node.values if isinstance(node, ast.Dict) else list(ast.iter_child_nodes(node))
        if isinstance(node, ast.Tuple) and len(parts) == 3 and all(isinstance(x, ast.Constant | ast.JoinedStr)
                                                                    for x in parts[:2]):
            parts = parts[1:]
        for part in parts:
            yield from _strings(part)
