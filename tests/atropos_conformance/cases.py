"""The cases of the suite and the table of docs/atropos.md: every test says in its first line "case: what is expected".

`python tests/atropos_conformance/cases.py` writes the table; a test fails when it is not what the tests say.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
DOCS = HERE.parents[1] / "docs" / "atropos.md"
START, END = "<!-- conformance:start -->", "<!-- conformance:end -->"
FILES = (
    "connection",
    "groups",
    "versions",
    "multi_turn",
    "outage",
    "environments",
    "published",
)  # in the order of the table
# How this project does what the table expects, where the word is not simply yes.
HOW = {
    "test_foreign_run_is_refused": "exit code 2; `atropos.take_over` named as the way",
    "test_foreign_run_is_taken_over_when_told_to": "`atropos.take_over=true`",
    "test_waiting_trainer_neither_hammers_nor_sleeps": "0.05 s to 1 s, jittered",
    "test_slow_batch_is_waited_for": "`atropos.batch_timeout`, at least 120 s",
    "test_silent_read_is_given_up_and_counted": "`atropos/lost_batches`",
    "test_each_update_trains_one_batch_once": "all formed batches are fetched at once and sorted; one is trained",
    "test_behaviour_logprobs_make_truncated_importance_weights": "`trainer.importance_cap`",
    "test_missing_logprobs_and_the_sentinel_are_no_logprobs": "weight 1; the ledger's where the gateway sampled them",
    "test_counters_match_exactly_what_was_sent": "`atropos/groups_dropped_<reason>`",
    "test_numbers_that_are_not_finite_cost_one_batch_and_no_step": "`atropos/lost_batches`",
    "test_stated_version_is_the_one_that_sampled": "the gateway's ledger knows it",
    "test_too_old_a_group_is_dropped": "`atropos.max_version_lag`, counted as `stale`",
    "test_other_logprobs_than_the_sampler_gave_are_corrected": "`atropos/logprobs_corrected`",
    "test_silent_api_does_not_stop_a_run_that_may_fall_back": "`rollout=auto`, `atropos.data_timeout`",
    "test_run_goes_on_alone_without_an_api": "`rollout=auto`, `atropos.timeout`",
    "test_stall_is_explained_in_time": "`atropos.data_timeout`",
    "test_environment_that_does_not_start_is_given_up_with_its_last_words": "`atropos.max_restarts`",
}


@dataclass(frozen=True, kw_only=True)
class Case:
    test: str
    case: str
    expected: str


def cases() -> list[Case]:
    return [case for name in FILES for case in _cases_of(HERE / f"test_{name}.py")]


def table() -> str:
    rows = [f"| {case.case} | {case.expected} | {HOW.get(case.test, 'yes')} |" for case in cases()]
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
