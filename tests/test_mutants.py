"""The planted bugs of tests/mutants.py can still be planted: that is known in a second, where planting them takes an hour."""

from __future__ import annotations

import ast
from collections import Counter

from tests.mutants import MUTANTS, ROOT


def test_each_applies_once_and_leaves_python():
    bad = []
    for mutant in MUTANTS:
        source = (ROOT / mutant.path).read_text()
        changed = source.replace(mutant.old, mutant.new)
        if source.count(mutant.old) != 1 or changed == source:
            bad.append(mutant.name)
        elif mutant.path.endswith(".py"):
            ast.parse(changed)
    assert bad == []


def test_what_should_catch_them_is_there():
    tests = {test.partition("::")[0] for mutant in MUTANTS for test in mutant.tests}
    assert [test for test in tests if not (ROOT / test).exists()] == []


def test_no_two_have_one_name():
    names = Counter(mutant.name for mutant in MUTANTS)
    assert [name for name, count in names.items() if count > 1] == []
