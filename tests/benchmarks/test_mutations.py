"""The list of mistakes fits the source, and a mistake that no test notices is told apart from one that is noticed."""

from __future__ import annotations

import pytest
from benchmarks.mutations import CAUGHT, MUTATIONS, SURVIVED, Mutation, NotFound, check, mutated, page, run


def test_every_entry_is_in_the_source_exactly_once():
    assert not check(MUTATIONS)
    assert len(MUTATIONS) >= 40
    assert len({(mutation.file, mutation.old) for mutation in MUTATIONS}) == len(MUTATIONS)


def test_text_that_is_gone_or_there_twice_is_refused_by_name():
    for old, times in (("nowhere", 0), ("a", 2)):
        with pytest.raises(NotFound, match=f"x.py holds '{old}' {times} times"):
            mutated("a b a", Mutation("x.py", old, "c", ()))
    assert mutated("a b a", Mutation("x.py", "b", "c", ())) == "a c a"
    with pytest.raises(NotFound):
        mutated("a b a", Mutation("x.py", "b", "b", ()))


@pytest.fixture
def project(tmp_path):
    package, tests = tmp_path / "src" / "anybatch", tmp_path / "tests"
    package.mkdir(parents=True)
    tests.mkdir()
    (package / "__init__.py").write_text("")
    (package / "sums.py").write_text("def total(a, b):\n    return a + b\n\n\ndef unseen(a):\n    return a + 1\n")
    (tests / "test_sums.py").write_text(
        "from anybatch.sums import total, unseen\n\n\ndef test_total():\n    assert total(2, 3) == 5\n    unseen(1)\n"
    )
    return tmp_path


def test_mistakes_are_made_in_a_copy_and_judged_by_the_tests(project):
    before = (project / "src" / "anybatch" / "sums.py").read_text()
    noticed = Mutation("sums.py", "a + b", "a - b", ("test_sums.py",))
    unnoticed = Mutation("sums.py", "a + 1", "a - 1", ("test_sums.py",))
    broken = Mutation("sums.py", "return a + 1", "return (a", ("test_sums.py",))
    assert not check([noticed, unnoticed, broken], project)
    results = [run(("test_sums.py",), mutation, project) for mutation in (None, noticed, unnoticed, broken)]
    assert [result for result, *_ in results][:3] == [SURVIVED, CAUGHT, SURVIVED]
    assert results[1][1] == "test_sums.py::test_total"
    assert results[3][0] not in (CAUGHT, SURVIVED), "a module that cannot be imported shows nothing"
    assert (project / "src" / "anybatch" / "sums.py").read_text() == before
    text = page([(noticed, CAUGHT, "x"), (unnoticed, SURVIVED, "")], 60.0, 2)
    assert text.splitlines()[2].startswith("1 of 2 caught")
    assert check([Mutation("sums.py", "a + 9", "b", ("test_none.py",))], project)[1].startswith(
        "There is no tests/test_none.py"
    )
