"""docs/troubleshooting.md has every reason and message that the pack can print, and the commands that it prints."""

import ast
import platform
import re
from pathlib import Path

import pytest
import torch

from liteattention.kernels import triton_probe
from liteattention.runtime import Phase, kept, policy

ROOT = Path(__file__).resolve().parent.parent
PAGE = " ".join((ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").split())


def constants(module):
    return {value for name, value in vars(module).items() if name.isupper() and isinstance(value, str)}


def pieces(node):
    """The constant pieces of a text in the source, joined over parts that only a run can tell."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        return [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
    if isinstance(node, ast.BinOp):
        return pieces(node.left) + pieces(node.right)
    if isinstance(node, ast.IfExp):
        return [*pieces(node.body), "\0", *pieces(node.orelse)]
    return ["\0"]


def parsed(path):
    return ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))


def in_calls(path, functions, argument=0):
    """Texts that calls of these functions have at this place."""
    for node in parsed(path):
        function = getattr(node, "func", None)
        if getattr(function, "attr", getattr(function, "id", None)) in functions and len(node.args) > argument:
            yield node.args[argument]


def in_answers(path):
    """Texts that functions return in the second place of a pair."""
    for node in parsed(path):
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple) and len(node.value.elts) == 2:
            yield node.value.elts[1]


def cut(texts):
    """Each as a list of its constant pieces; those without any are left out."""
    found = [[piece.strip() for piece in "".join(pieces(text)).split("\0") if len(piece.strip()) > 3] for text in texts]
    return [text for text in found if text]


MESSAGES = {
    "notes": [text for folder in ("runtime", "host") for path in sorted((ROOT / folder).rglob("*.py"))
              for text in cut(in_calls(path, ("note", "_note")))],
    "verdicts on Triton": cut([*in_calls("kernels/triton_probe.py", ("TritonVerdict",), 1),
                               *in_calls("kernels/triton_probe.py", ("_refusal",))]),
    # Masks are made for the call: one that does not fit is our own error.
    "calls not served": [text for text in cut(in_calls("kernels/api.py", ("no",), 3)) if "mask for" not in text[0]],
    "profiles refused": cut(in_calls("runtime/profile.py", ("ProfileError",))),
    "calibrations without a profile": cut(in_answers("runtime/calibration.py")),
}
AT_LEAST = {"notes": 20, "verdicts on Triton": 6, "calls not served": 10, "profiles refused": 8,
            "calibrations without a profile": 3}


def test_the_page_has_every_reason():
    reasons = constants(policy) | {Phase.WARMUP.value, Phase.END.value, "fewer than … tokens"}
    assert len(reasons) > 20 and not {reason for reason in reasons if reason not in PAGE}


def test_the_page_says_why_a_run_starts_fresh():
    reasons = constants(kept)
    assert len(reasons) >= 7 and not {reason for reason in reasons if reason not in PAGE}


def test_the_page_has_what_other_nodes_cause():
    """Read from the source: host/companions.py needs a ComfyUI to be imported."""
    tree = ast.parse((ROOT / "host" / "companions.py").read_text(encoding="utf-8"))
    said = {node.targets[0].id: ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)}
    wanted = [said["SPARSE_NOTE"], said["FULLGRAPH_NOTE"], said["SPARSE_ON_TOP"]]
    assert not [text for text in wanted if text not in PAGE]


@pytest.mark.parametrize("kind", MESSAGES)
def test_the_page_has_every_message(kind):
    assert len(MESSAGES[kind]) >= AT_LEAST[kind], "the source is read in another way than it is written"
    assert not [text for text in MESSAGES[kind] if not all(piece in PAGE for piece in text)]


@pytest.mark.parametrize("version", [f"2.{minor}" for minor in range(5, 14)])
def test_the_page_names_the_triton_that_the_note_on_windows_names(version, monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Windows")
    monkeypatch.setattr(torch, "__version__", f"{version}.0+cu128")
    command = triton_probe.install_hint().partition("run: ")[2]
    wanted = command.partition("pip install ")[2]
    rows = dict(re.findall(r"\| (2\.\d+) \| `([^`]+)` \|", PAGE))
    assert wanted.startswith(('"triton-windows==', "triton-windows"))
    assert rows.get(version) == (wanted if "==" in wanted else None)


@pytest.mark.parametrize("system, hip", [("Linux", None), ("Linux", "7.2"), ("Darwin", None)])
def test_the_page_names_what_the_note_on_other_systems_names(system, hip, monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(torch.version, "hip", hip, raising=False)
    hint = triton_probe.install_hint()
    said = {"Darwin": "Triton does not exist for macOS"}.get(system, "pytorch-triton-rocm" if hip else
                                                             "-m pip install triton")
    assert said in hint and said in PAGE


def test_links_inside_the_page_lead_somewhere():
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    headings = {re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
                for line in text.splitlines() if line.startswith("#")}
    assert not {anchor for anchor in re.findall(r"\]\(#([^)]+)\)", text) if anchor not in headings}
