"""The table of reasons in docs/troubleshooting.md, from runtime/reasons.py: python tools/reasons.py [--write]"""

from __future__ import annotations

import argparse
from pathlib import Path

from load_pack import load_pack

PAGE = Path(__file__).resolve().parent.parent / "docs" / "troubleshooting.md"
BEGIN, END = "<!-- reasons: python tools/reasons.py --write -->\n", "<!-- end of the reasons -->\n"
HEADER = "| reason | what it means | what to do |\n|---|---|---|\n"


def table() -> str:
    """Markdown."""
    from liteattention.runtime.reasons import REASONS

    return HEADER + "".join(f"| {reason.text} | {reason.meaning} | {reason.hint or 'normal, or your setting'} |\n"
                            for reason in REASONS)


def page() -> str:
    """docs/troubleshooting.md with the table as it has to be."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/troubleshooting.md")
    write = parser.parse_args().write
    load_pack()
    if write:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(table(), end="")


if __name__ == "__main__":
    main()
