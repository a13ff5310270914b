"""The table of docs/atropos.md says what the tests say."""

from __future__ import annotations

from collections import Counter

from tests.atropos_conformance.cases import FILES, HERE, HOW, cases, documented, table


def test_every_file_of_the_suite_is_in_the_table() -> None:
    assert {f"test_{name}.py" for name in FILES} | {"test_table.py"} == {path.name for path in HERE.glob("test_*.py")}


def test_cases_have_names_of_their_own() -> None:
    assert max(Counter(case.test for case in cases()).values()) == 1
    assert set(HOW) <= {case.test for case in cases()}


def test_docs_have_the_table() -> None:
    assert documented() == table(), "python tests/atropos_conformance/cases.py writes it"
