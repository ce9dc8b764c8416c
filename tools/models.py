"""The table of docs/models.md, from the families and the cases of their tests: python tools/models.py [--write]

Needs a ComfyUI (see tools/comfyui.py) and pytest, because the tests are read, not run.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from comfyui import find_comfyui
from load_pack import load_pack

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- table: python tools/models.py --write -->\n", "<!-- end of the table -->\n"
HEADER = ("family", "network in ComfyUI", "text", "must-keep", "blocks numbered by", "left, besides cross-attention",
          "tested")


def start_comfyui() -> None:
    """ComfyUI on the path and on the CPU, the pack as `liteattention`, and the host tests importable."""
    comfy = find_comfyui()
    if comfy is None:
        sys.exit("no ComfyUI found; set COMFYUI_PATH")
    load_pack()
    sys.path[:0] = [str(comfy), str(ROOT / "tests" / "host")]
    arguments, sys.argv = sys.argv, [str(comfy / "main.py"), "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args  # noqa: F401

    sys.argv = arguments


def cases() -> dict[str, list]:
    """The cases of tests/host/test_family_*.py by family; their folder is on the path."""
    found: dict[str, list] = {}
    for path in sorted((ROOT / "tests" / "host").glob("test_family_*.py")):
        for case in importlib.import_module(path.stem).CASES:
            found.setdefault(case.family, []).append(case)
    return found


def table() -> str:
    """Markdown."""
    from liteattention.host import families

    tested = cases()
    rows = [_row(family, tested.get(family.name, [])) for family in families.known()]
    lines = [HEADER, ["---"] * len(HEADER), *sorted(rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def page() -> str:
    """docs/models.md with the table as it has to be."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


def _row(family, tested: list) -> list[str]:
    from liteattention.host.families.family import BlockHooks, BlockPatches, ForeignForward

    numbering = {type(None): "the model", BlockPatches: "us, in its block replacement",
                 BlockHooks: "us, in hooks during a call",
                 ForeignForward: "the model; us, where a node replaces its forward"}[type(family.numbering)]
    what = [f"{case.what}{' *' if case.sizes else ''}" for case in tested]
    return [family.name, ", ".join(f"`{name}`" for name in family.models), family.text, _kept(family), numbering,
            ", ".join(family.left) or "–", "; ".join(what) or "no"]


def _kept(family) -> str:
    from liteattention.host.families.family import nothing, unknown

    if family.front is nothing:
        return "none" if family.behind is nothing else "what is longer than the video, behind it"
    if family.behind is nothing:
        return "what is longer than the video, in front of it"
    side, rule = ("behind", family.behind) if family.front is unknown else ("in front", family.front)
    other = "in front" if side == "behind" else "behind"
    amount = rule.__doc__.split(".")[0].strip()
    return f"{side}: {amount[0].lower()}{amount[1:]}; {other}: what else is longer than the video"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/models.md")
    write = parser.parse_args().write
    start_comfyui()
    if write:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(table(), end="")


if __name__ == "__main__":
    main()
