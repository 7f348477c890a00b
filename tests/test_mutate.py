"""The lists of `scripts/run check mutate`: they fit the code as it is, and drawing is repeatable."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def scripts() -> Iterator[None]:
    """Let `check` be imported, as running the script does."""
    sys.path.insert(0, str(ROOT / "scripts"))
    yield
    sys.path.remove(str(ROOT / "scripts"))


def test_the_named_ones_fit_the_code_as_it_is() -> None:
    from check.mutate.named import NAMED, named

    mutations = named(ROOT)
    assert len({m.name for m in mutations}) == len(NAMED)
    for mutation in mutations:
        ast.parse(mutation.after)
        assert mutation.diff()
        assert all((ROOT / test).exists() for test in mutation.tests)


def test_a_mutation_that_went_stale_is_an_error() -> None:
    from check.mutate.mutation import StaleError, replaced

    for text in ("text that is not there", "import"):
        with pytest.raises(StaleError, match=r"named\.py"):
            replaced(ROOT, "x", "tesseraq_gguf/learning/distillation.py", text, "", ())


def test_what_is_drawn_is_the_same_every_time_and_of_each_line_once() -> None:
    from check.mutate.drawn import draw

    drawn = draw(ROOT, 20, 0, "packer")
    assert drawn == draw(ROOT, 30, 0, "packer")[:20]
    assert len({(m.file, m.line) for m in drawn}) == 20
    assert {m.diff() for m in draw(ROOT, 20, 1, "packer")} != {m.diff() for m in drawn}
    for mutation in drawn:
        ast.parse(mutation.after)
        assert all((ROOT / test).exists() for test in mutation.tests)


def test_mutations_known_to_be_equivalent_are_still_there_and_have_a_reason() -> None:
    from check.mutate.drawn import candidates
    from check.mutate.equivalent import EQUIVALENT

    possible = {
        (file, line.strip())
        for file in {file for file, _ in EQUIVALENT}
        for source in [(ROOT / file).read_text(encoding="utf-8")]
        for _, first, last, instead in candidates(file, source)
        for line in _changed(source, first, last, instead)
    }
    assert not EQUIVALENT.keys() - possible
    assert all(EQUIVALENT.values())


def _changed(source: str, first: int, last: int, instead: str) -> list[str]:
    """The lines with a mutation, as they are then."""
    begin = source.rfind("\n", 0, first) + 1
    return (source[begin:first] + instead + source[last : source.find("\n", last)]).splitlines()


SOURCE = '''
def f(a: int = 3, *, strict=True) -> int:
    """Say 5."""
    g(a, b)
    a += 1
    if a and not x.abs().sum(-1) <= 2.5:
        raise ValueError("1" + "2")
    return min(a, -b) << (c + 1)
'''


def test_what_can_be_wrong() -> None:
    from check.mutate.drawn import candidates

    found = set()
    for _, first, last, instead in candidates("f.py", SOURCE):
        changed = SOURCE[:first] + instead + SOURCE[last:]
        found |= set(changed.splitlines()) - set(SOURCE.splitlines())
    expected = """
def f(a: int = 4, *, strict=True) -> int:
def f(a: int = 2, *, strict=True) -> int:
def f(a: int = 3, *, strict=False) -> int:
    pass
    g(b, a)
    a += 2
    a += 0
    if a or not x.abs().sum(-1) <= 2.5:
    if not (a and not x.abs().sum(-1) <= 2.5):
    if a and (x.abs().sum(-1) <= 2.5):
    if a and not x.sum(-1) <= 2.5:
    if a and not x.abs().mean(-1) <= 2.5:
    if a and not x.abs().sum(-1) < 2.5:
    if a and not x.abs().sum(-1) >= 2.5:
    if a and not x.abs().sum(-1) <= 5.0:
    return max(a, -b) << (c + 1)
    return min(a, (b)) << (c + 1)
    return min(a, -b) >> (c + 1)
    return min(a, -b) << (c - 1)
    return min(a, -b) << (c + 2)
    return min(a, -b) << (c + 0)
"""
    assert found == set(expected.strip("\n").splitlines())
