"""The cases of the suite and the table of docs/atropos.md: every test says in its first line "case: what is expected".

`python tests/atropos_conformance/cases.py` writes the table; a test fails when it is not what the tests say.
"""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
DOCS = HERE.parents[1] / "docs" / "atropos.md"
START, END = "<!-- conformance:start -->", "<!-- conformance:end -->"
FILES = ("connection", "groups", "versions", "multi_turn", "outage", "environments")  # in the order of the table


@dataclass(frozen=True, kw_only=True)
class Case:
    test: str
    case: str
    expected: str


def cases() -> list[Case]:
    return [case for name in FILES for case in _cases_of(HERE / f"test_{name}.py")]


def table() -> str:
    sys.path.insert(0, str(HERE.parents[1]))
    from tests.atropos_conformance.contract import load

    how = load().HOW
    rows = [f"| {case.case} | {case.expected} | {how.get(case.test, 'yes')} |" for case in cases()]
    return "\n".join(["| case | expected | this project |", "| --- | --- | --- |", *rows])


def documented() -> str:
    """The table as the docs have it."""
    return DOCS.read_text().split(START)[1].split(END)[0].strip()


def _cases_of(path: Path) -> list[Case]:
    found = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            case, colon, expected = " ".join((ast.get_docstring(node) or "").split()).partition(": ")
            assert colon, f"{path.name}: {node.name} does not begin with its case and what is expected"
            found.append(Case(test=node.name, case=case, expected=expected.removesuffix(".")))
    return found


if __name__ == "__main__":
    before, rest = DOCS.read_text().split(START)
    DOCS.write_text(f"{before}{START}\n{table()}\n{END}{rest.split(END)[1]}")
