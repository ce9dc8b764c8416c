"""docs/troubleshooting.md has every reason and message that the pack can print, and the commands that it prints."""

import ast
import platform
import re
from pathlib import Path

import pytest
import reasons
import torch

from liteattention.kernels import compiler_trouble, triton_probe
from liteattention.runtime import masks, run

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
PAGE = " ".join(TEXT.split())


def pieces(place, *paths):
    """Of texts that stand at a place of the source (a pattern): the parts that do not depend on the run."""
    found = (text for path in paths for text in re.findall(place + r'\s*f?"([^"]*)"', path.read_text("utf-8")))
    return {piece.strip() for text in found for piece in re.split(r"{[^}]*}", text) if len(piece.strip()) > 3}


def constants(path):
    """Module-level texts by their names, from the source: host/ needs a ComfyUI to be imported."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.targets[0].id, node.value.value


SOURCES = [path for folder in ("runtime", "host") for path in sorted((ROOT / folder).glob("*.py"))]
KERNELS = ROOT / "kernels"
MESSAGES = {
    "notes": pieces(r"note(?:s\.add)?\(", *SOURCES),
    "notes about other nodes": {text for path in SOURCES for name, text in constants(path) if name.endswith("_NOTE")},
    "why nothing reaches the pack": pieces(r"(?:reached|NO_CALL)\.format\(", ROOT / "host" / "interop.py"),
    "what is said of Raylight": {
        piece.strip() for path in sorted((ROOT / "host" / "raylight").glob("*.py")) for _, text in constants(path)
        if " " in text for piece in text.split("{}")},
    "notes about masks": {masks.SIZE_CHANGED, masks.NO_MATCH, *pieces(r"None, \(", ROOT / "runtime" / "masks.py")},
    "why no run is continued": {run.NO_RUN, run.NOT_FINISHED, run.SEVERAL, run.NOTHING, run.LOST},
    "calls that the kernels do not compute": pieces(r'return no\([^#]*?,\s*(?=f?"[^"]*"\)\n)', KERNELS / "api.py"),
    "verdicts on Triton": pieces(
        r'(?:TritonVerdict\(False,|_refusal\(|return(?= f"the ))', KERNELS / "triton_probe.py"),
    "what compilers complain of": {piece.strip() for _, meaning in compiler_trouble._KNOWN
                                   for piece in meaning.split(":")[:1]},
}
AT_LEAST = {"notes": 16, "notes about other nodes": 2, "why nothing reaches the pack": 4,
            "what is said of Raylight": 9, "notes about masks": 3, "why no run is continued": 5,
            "calls that the kernels do not compute": 14, "verdicts on Triton": 6,
            "what compilers complain of": 7}


def test_the_page_has_the_table_of_reasons():
    """python tools/reasons.py --write"""
    assert reasons.page() == TEXT


@pytest.mark.parametrize("kind", MESSAGES)
def test_the_page_has_every_message(kind):
    assert len(MESSAGES[kind]) >= AT_LEAST[kind], "the source is read in another way than it is written"
    assert not {text for text in MESSAGES[kind] if text not in PAGE}


@pytest.mark.parametrize("version", [f"2.{minor}" for minor in range(5, 17)])
def test_the_page_names_the_triton_that_the_note_on_windows_names(version, monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Windows")
    monkeypatch.setattr(torch, "__version__", f"{version}.0+cu128")
    wanted = triton_probe.install_hint().partition("pip install ")[2]
    rows = {torch_version: command for versions, command in re.findall(r"\| ([^|]+) \| `([^`]+)` \|", PAGE)
            for torch_version in versions.split(", ")}
    assert rows.get(version, "triton-windows") == wanted


@pytest.mark.parametrize("system, hip", [("Linux", None), ("Linux", "7.2"), ("Darwin", None)])
def test_the_page_names_what_the_note_on_other_systems_names(system, hip, monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(torch.version, "hip", hip, raising=False)
    hint = triton_probe.install_hint()
    said = {"Darwin": "Triton does not exist for macOS"}.get(system, "pytorch-triton-rocm" if hip else
                                                             "-m pip install triton")
    assert said in hint and said in PAGE


def test_links_inside_the_page_lead_somewhere():
    headings = {re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
                for line in TEXT.splitlines() if line.startswith("#")}
    assert not {anchor for anchor in re.findall(r"\]\(#([^)]+)\)", TEXT) if anchor not in headings}
