"""The ledger by itself, every case by hand."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from atropos_exp.parts.gateway.ledger import ENTRY_TOKENS, CompletionLedger
from atropos_exp.processes.wire import pack, unpack
from atropos_exp.types import Provenance

P = [5, 6, 7]


def ledger(max_tokens: int = 100_000) -> CompletionLedger:
    return CompletionLedger(max_tokens=max_tokens, name="gw")


def add(
    book: CompletionLedger,
    prompt: list[int],
    tokens: list[int],
    first: float = -0.1,
    version: int = 0,
    temperature: float = 1.0,
) -> list[float]:
    """Logprobs first, first - 1, …"""
    logprobs = [first - index for index in range(len(tokens))]
    book.add(
        np.array(prompt, dtype=np.int32),
        np.array(tokens, dtype=np.int32),
        np.array(logprobs, dtype=np.float32),
        policy_version=version,
        temperature=temperature,
    )
    return logprobs


def find(book: CompletionLedger, tokens: list[int], mask: str, claim: bool = True) -> Provenance | None:
    """`mask`: T trained, - not."""
    assert len(tokens) == len(mask)
    return book.lookup(np.array(tokens, dtype=np.int32), np.array([m == "T" for m in mask]), claim=claim)


def known(found: Provenance | None) -> Provenance:
    assert found is not None
    return found


def test_a_completion_comes_back_with_what_was_stored() -> None:
    book = ledger()
    add(book, P, [1, 2], first=-0.25, version=3, temperature=0.5)
    found = known(find(book, [*P, 1, 2], "---TT"))
    assert found.logprobs.dtype == np.float32
    assert found.logprobs.tolist() == [0, 0, 0, -0.25, -1.25]
    assert (found.policy_version, found.temperature, found.returned_before, found.key) == (3, 0.5, False, "gw-0")
    assert (book.hits, book.misses) == (1, 0)


@pytest.mark.parametrize(
    ("tokens", "mask"),
    [
        ([*P, 1, 3], "---TT"),  # another answer
        ([5, 6, 8, 1, 2], "---TT"),  # to another prompt
        ([*P, 1, 2, 9], "---TTT"),  # goes on with a token that was not sampled
        ([*P, 1, 2], "--TTT"),  # a prompt token is said to be trained
        ([*P, 1, 2], "----T"),  # what stands before the trained token is no prompt of ours
        ([*P, 1, 2], "-----"),  # nothing is trained
        ([1, 2], "TT"),  # no prompt at all
    ],
)
def test_what_was_not_sampled_here_is_a_miss(tokens: list[int], mask: str) -> None:
    book = ledger()
    add(book, P, [1, 2])
    assert find(book, tokens, mask) is None
    assert (book.hits, book.misses) == (0, 1)


def test_a_miss_claims_nothing() -> None:
    book = ledger()
    add(book, P, [1, 2])
    assert find(book, [*P, 1, 2, 8, 9], "---TT-T") is None  # the second span is unknown
    assert not known(find(book, [*P, 1, 2], "---TT")).returned_before


def test_a_completion_that_the_environment_cut_still_matches() -> None:
    book = ledger()
    add(book, P, [1, 2, 3, 4], first=-0.5)
    assert known(find(book, [*P, 1, 2], "---TT")).logprobs.tolist() == [0, 0, 0, -0.5, -1.5]
    assert known(find(book, [*P, 1, 2, 9], "---TT-")).returned_before  # and goes on with other tokens


def test_the_uncut_one_of_two_that_fit_is_taken() -> None:
    book = ledger()
    add(book, P, [1, 2, 3], first=-0.1)
    add(book, P, [1, 2], first=-0.2)
    assert known(find(book, [*P, 1, 2], "---TT")).key == "gw-1"
    assert known(find(book, [*P, 1, 2], "---TT")).key == "gw-0"  # the other one, cut, is left


def test_two_equal_completions_are_two_the_newer_one_first() -> None:
    book = ledger()
    add(book, P, [1, 2], version=1)
    add(book, P, [1, 2], version=2)
    keys = [known(find(book, [*P, 1, 2], "---TT")) for _ in range(3)]
    assert [found.key for found in keys[:2]] == ["gw-1", "gw-0"]
    assert [found.returned_before for found in keys] == [False, False, True]
    assert [found.policy_version for found in keys[:2]] == [2, 1]


def test_looking_without_a_claim_changes_nothing() -> None:
    book = ledger()
    add(book, P, [1, 2])
    for _ in range(2):
        found = known(find(book, [*P, 1, 2], "---TT", claim=False))
        assert (found.key, found.returned_before) == ("gw-0", False)


def test_two_turns_with_a_tools_answer_between() -> None:
    """The prompt of the second turn is all that stands before it."""
    book = ledger()
    first = add(book, P, [1, 2], first=-0.5, version=4, temperature=0.7)
    second = add(book, [*P, 1, 2, 30, 31], [8], first=-0.125, version=3, temperature=0.7)
    found = known(find(book, [*P, 1, 2, 30, 31, 8], "---TT--T"))
    assert found.logprobs.tolist() == [0, 0, 0, *first, 0, 0, *second]
    assert (found.policy_version, found.temperature, found.key) == (3, 0.7, "gw-0")


def test_turns_of_different_temperatures_have_none() -> None:
    book = ledger()
    add(book, P, [1], temperature=0.7)
    add(book, [*P, 1, 30], [8], temperature=1.0)
    assert known(find(book, [*P, 1, 30, 8], "---T-T")).temperature is None


def test_two_completions_end_to_end_in_one_span() -> None:
    book = ledger()
    add(book, P, [1, 2], first=-0.5)
    add(book, [*P, 1, 2], [3, 4], first=-2.0)
    found = known(find(book, [*P, 1, 2, 3, 4], "---TTTT"))
    assert found.logprobs.tolist() == [0, 0, 0, -0.5, -1.5, -2.0, -3.0]
    add(book, [*P, 1, 2, 3, 4], [9] * 2000)  # and a long one, cut
    assert len(known(find(book, [*P, 1, 2, 3, 4, *[9] * 1999], "---TTTT" + "T" * 1999)).logprobs) == 2006


def test_a_way_that_leads_nowhere_is_left_again() -> None:
    """[1] then [2, 3] works, [1, 2] then nothing does not, although it covers more at first."""
    book = ledger()
    add(book, P, [1])
    add(book, P, [1, 2])
    add(book, [*P, 1], [2, 3], version=7)
    found = known(find(book, [*P, 1, 2, 3], "---TTT", claim=False))
    assert (found.key, found.policy_version) == ("gw-0", 0)
    known(find(book, [*P, 1], "---T"))  # claims gw-0: now it comes last, and still it is found
    assert known(find(book, [*P, 1, 2, 3], "---TTT")).key == "gw-0"


def test_a_sequence_has_come_back_only_if_all_of_it_has() -> None:
    book = ledger()
    add(book, P, [1])
    add(book, [*P, 1, 30], [8])
    assert not known(find(book, [*P, 1], "---T")).returned_before
    assert not known(find(book, [*P, 1, 30, 8], "---T-T")).returned_before
    assert known(find(book, [*P, 1, 30, 8], "---T-T")).returned_before


def test_many_short_completions_end_to_end() -> None:
    """Token by token, as a search does it: no recursion, and not quadratic in the candidates."""
    book = ledger(10**6)
    tokens = list(range(100, 3100))
    for index, token in enumerate(tokens):
        add(book, P + tokens[:index], [token], version=index)
    found = known(find(book, P + tokens, "---" + "T" * 3000))
    assert found.policy_version == 0 and len(found.logprobs) == 3003
    assert find(book, [*P, *tokens, 1], "---" + "T" * 3001) is None


def test_the_oldest_go_first_and_the_rest_stays_found() -> None:
    weight = 2 + ENTRY_TOKENS
    book = ledger(max_tokens=3 * weight)
    for answer in range(5):
        add(book, P if answer % 2 else [*P, 9], [answer, 1])
    assert (len(book), book.num_tokens, book.evicted) == (3, 3 * weight, 2)
    for answer in range(5):
        prompt = P if answer % 2 else [*P, 9]
        found = find(book, [*prompt, answer, 1], "-" * len(prompt) + "TT")
        assert (found is not None) == (answer >= 2)


def test_one_that_is_larger_than_the_ledger_is_not_kept() -> None:
    book = ledger(max_tokens=100)
    add(book, P, [1] * 60)
    assert (len(book), book.num_tokens, book.evicted) == (0, 0, 1)
    assert find(book, [*P, 1], "---T") is None


def test_random_sequences_against_a_plain_search() -> None:
    """Small alphabet, many overlaps: found exactly if some concatenation of completions covers every span."""
    generator = np.random.default_rng(0)
    for _ in range(30):
        book, store = ledger(), []
        for _ in range(12):
            prompt = generator.integers(0, 2, size=generator.integers(1, 5)).tolist()
            tokens = generator.integers(0, 2, size=generator.integers(1, 4)).tolist()
            add(book, prompt, tokens)
            store.append((prompt, tokens))

        def covered(tokens: list[int], start: int, end: int, store: Any = store) -> bool:
            if start >= end:
                return True
            return any(
                prompt == tokens[:start]
                and answer[: end - start] == tokens[start:end][: len(answer)]
                and covered(tokens, start + len(answer), end)
                for prompt, answer in store
            )

        for _ in range(40):
            tokens = generator.integers(0, 2, size=8).tolist()
            mask = [False, *generator.integers(0, 2, size=7).astype(bool).tolist()]
            spans, start = [], None
            for index, flag in enumerate([*mask, False]):
                if flag and start is None:
                    start = index
                if not flag and start is not None:
                    spans.append((start, index))
                    start = None
            expected = bool(spans) and all(covered(tokens, *span) for span in spans)
            text = "".join("T" if flag else "-" for flag in mask)
            assert (find(book, tokens, text, claim=bool(generator.integers(2))) is not None) == expected


def test_what_is_known_travels() -> None:
    first = Provenance(
        policy_version=3,
        logprobs=np.array([0, -0.5], dtype=np.float32),
        temperature=None,
        returned_before=True,
        key="a-1",
    )
    second = Provenance(
        policy_version=2**40,
        logprobs=np.array([0, 0, -1], dtype=np.float32),
        temperature=0.3,
        returned_before=False,
        key="a-2",
    )
    back = unpack(pack({"found": [asdict(first), None, asdict(second)]}))["found"]
    assert back[1] is None
    for found, expected in ((Provenance(**back[0]), first), (Provenance(**back[2]), second)):
        assert found.logprobs.dtype == np.float32 and found.logprobs.tolist() == expected.logprobs.tolist()
        for name in ("policy_version", "temperature", "returned_before", "key"):
            assert getattr(found, name) == getattr(expected, name)
