"""Write locales/en/nodeDefs.json from the schemas, and say what the other languages lack: python tools/locales.py

What they lack are texts of the nodes in nodeDefs.json, texts of a run in summary.json, and help pages.

ComfyUI's frontend reads these files from `/i18n` (ComfyUI, app/custom_node_manager.py) and takes their texts in the
place of those in the schema. A label starts with the name that the schema gives, followed by a translation, because
tooltips, run summaries and help pages use that name.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from comfyui import find_comfyui  # noqa: E402
from environment import rerun_with_requirements  # noqa: E402
from texts import run_texts  # noqa: E402

LANGUAGES = ("en", "zh", "ja", "ko")


def locale_file(language: str) -> Path:
    """Where ComfyUI looks for the node texts of a language."""
    return ROOT / "locales" / language / "nodeDefs.json"


def read_locale(language: str) -> dict:
    """The node texts of a language, by node id."""
    return json.loads(locale_file(language).read_text(encoding="utf-8"))


def node_texts(object_info: dict) -> dict:
    """The node texts of the schemas, in the layout of nodeDefs.json.

    Args:
        object_info: what a server answers to `/object_info`.
    """
    return {name: _texts(node) for name, node in object_info.items() if name.startswith("LiteAttention")}


def _texts(node: dict) -> dict:
    inputs = dict(_inputs(node["input"]))
    outputs = zip(node["output_name"], node["output_tooltips"], strict=True)
    return {
        "display_name": node["display_name"], "description": node["description"],
        "inputs": {key: {"name": name, "tooltip": tooltip} for key, (name, tooltip) in inputs.items()},
        "outputs": {str(i): {"name": name, "tooltip": tooltip} for i, (name, tooltip) in enumerate(outputs)}}


def _inputs(sections: dict, prefix: str = "") -> Iterator[tuple[str, tuple[str, str]]]:
    """(key, (name, tooltip)) of every input; what a dynamic combo shows has the combo's name before it, joined by the
    character that the frontend puts in the place of a dot."""
    for name, (_, options) in {**sections.get("required", {}), **sections.get("optional", {})}.items():
        yield prefix + name, (options.get("display_name") or name, options["tooltip"])
        for option in options.get("options", ()):
            if isinstance(option, dict):
                yield from _inputs(option["inputs"], f"{prefix}{name}_")


def leaves(tree: dict, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """(keys that lead to it, text) of every text."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def run_and_pages(language: str) -> Iterator[str]:
    """What a language lacks, or has too much, of the texts of a run, which are read from the source, and of help pages.
    """
    file = ROOT / "locales" / language / "summary.json"
    there = set(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else set()
    for what, keys in (("lacks of a run", run_texts() - there), ("is of no run", there - run_texts())):
        yield from (f"{what}: {key}" for key in sorted(keys))
    for page in sorted((ROOT / "web" / "docs").glob("*.md")):
        if not (page.with_suffix("") / f"{language}.md").is_file():
            yield f"lacks the help page of {page.stem}"


def main() -> int:
    comfy_path = find_comfyui()
    if comfy_path is None:
        sys.exit("No ComfyUI found (COMFYUI_PATH, the one this pack is installed in, ~/ComfyUI); the schemas need one.")
    rerun_with_requirements(comfy_path)
    from server import ComfyServer

    with ComfyServer(comfy_path) as server:
        texts = node_texts(server.get("/object_info"))
    wanted = dict(leaves(texts))
    path = locale_file("en")
    before = dict(leaves(read_locale("en"))) if path.is_file() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(texts, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    changed = {keys for keys, text in wanted.items() if before.get(keys) != text}
    print(f"{path.relative_to(ROOT)}: {len(wanted)} texts, {len(changed)} new or changed")
    lacking = 0
    for language in LANGUAGES[1:]:
        for what in run_and_pages(language):
            lacking += 1
            print(f"{language}: {what}")
        there = dict(leaves(read_locale(language))) if locale_file(language).is_file() else {}
        for what, keys in (("lacks", set(wanted) - set(there)), ("is of no node", set(there) - set(wanted)),
                           ("to translate anew", changed & set(there))):
            lacking += len(keys)
            for key in sorted(keys):
                print(f"{language}: {what}: {'/'.join(key)}")
    return 1 if lacking else 0


if __name__ == "__main__":
    sys.exit(main())
