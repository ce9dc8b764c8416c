"""The texts of a run in the user's language, looked up by the English ones in locales/*/summary.json, as gettext does.

Inside and in the log they are English: reasons, notes and advice are counted, compared and searched by it. They are
translated where they are shown. `python tools/locales.py` lists what a language lacks; that stays English.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from string import Formatter

ENGLISH = "en"
_LOCALES = Path(__file__).resolve().parent.parent / "locales"


class Words:
    """One language.

    Args:
        table: translations by English template. Lines have names in braces, sentences that arrive finished have
            numbers, in the order of the English one.
    """

    def __init__(self, table: Mapping[str, str]):
        self._table = table
        sentences = [template for template in table if "{0}" in template]
        self._sentences = [(_pattern(template), table[template]) for template in sorted(sentences, key=_certainty)]

    def __call__(self, template: str, **values: object) -> str:
        """A line: its template in this language, filled with values that are in this language already."""
        return self._table.get(template, template).format(**values)

    def told(self, sentence: object) -> str:
        """A finished English sentence in this language, found again by its template, and so is what fills it."""
        text = str(sentence)
        if text in self._table:
            return self._table[text]
        for pattern, translation in self._sentences:
            if found := pattern.fullmatch(text):
                return translation.format(*map(self.told, found.groups()))
        return text

    def listed(self, text: str, separator: str = ", ") -> str:
        """A list in one English text; its parts and its separator are told one by one."""
        return self._table.get(separator, separator).join(map(self.told, text.split(separator)))


def _pattern(template: str) -> re.Pattern:
    return re.compile("".join(re.escape(fixed) + ("" if name is None else "(.*?)")
                              for fixed, name, _, _ in Formatter().parse(template)), re.DOTALL)


def _certainty(template: str) -> tuple[int, int]:
    """For sorting: what fixes most of a sentence's beginning first, for what fills it may be one that fixes more."""
    fixed = [len(part) for part, _, _, _ in Formatter().parse(template)]
    return -fixed[0], -sum(fixed)


@lru_cache(maxsize=None)
def words(language: str) -> Words:
    """Of a language of the frontend ("zh"). One without a readable table is English. Read once."""
    try:
        return Words(json.loads((_LOCALES / language / "summary.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return Words({})
