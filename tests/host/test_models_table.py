"""docs/models.md against the families and their tests."""

import models

from liteattention.host import families


def test_the_committed_table_is_the_generated_one():
    assert models.PAGE.read_text(encoding="utf-8") == models.page(), "run: python tools/models.py --write"


def test_every_family_is_tested_under_its_name():
    known = families.known()
    assert {family.name for family in known} == set(models.cases())
    names = [name for family in known for name in family.models]
    assert len(names) == len(set(names)), "a class belongs to one family"
    tested = {case.network.split(":")[1] for cases in models.cases().values() for case in cases}
    assert tested == set(names)
