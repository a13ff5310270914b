"""The memory of what was sampled and by which weights, so that sequences that come back are recognised."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xxhash

from atropos_exp.parts.gateway.options import ENTRY_TOKENS
from atropos_exp.types import Floats, Mask, Provenance, TokenIds

_ID_BYTES = _LOGPROB_BYTES = 4


@dataclass(kw_only=True, slots=True, eq=False)
class LedgerEntry:
    """One sampled completion of a prompt. Arrays are kept as bytes, which are small and quick to compare."""

    prompt_key: bytes
    token_ids: bytes  # int32 [R]
    logprobs: bytes  # float32 [R]
    policy_version: int
    temperature: float
    serial: int
    claimed: bool = False

    @property
    def num_tokens(self) -> int:
        """The length R of the completion."""
        return len(self.token_ids) // _ID_BYTES


class CompletionLedger:
    """The newest completions, up to `max_tokens`; each counts its tokens plus ENTRY_TOKENS.

    Example: after `add([1, 2], [7, 8], logprobs, policy_version=3, temperature=1.0)`, a lookup of [1, 2, 7, 8] with the
    last two tokens trained gives version 3 and their logprobs. A multi-turn sequence is found turn by turn: each run of
    trained tokens must continue a prompt that the ledger has seen.
    """

    def __init__(self, *, max_tokens: int, name: str) -> None:
        """`name` makes the keys of this ledger differ from those of an earlier process."""
        self._max_tokens = max_tokens
        self._name = name
        self._of_prompt: dict[bytes, list[LedgerEntry]] = {}  # oldest first
        self._order: deque[LedgerEntry] = deque()  # oldest first
        self._num_added = 0
        self.num_tokens = 0  # weight of what is kept
        self.hits = self.misses = self.evicted = 0

    def __len__(self) -> int:
        return len(self._order)

    def add(
        self, prompt: TokenIds, token_ids: TokenIds, logprobs: Floats, *, policy_version: int, temperature: float
    ) -> None:
        """Keep a completion [R] of `prompt` [P]. Its `logprobs` [R] are nats at `temperature`."""
        assert len(token_ids) == len(logprobs) > 0
        completion = LedgerEntry(
            prompt_key=_key(prompt.astype(np.int32, copy=False).tobytes()),
            token_ids=token_ids.astype(np.int32, copy=False).tobytes(),
            logprobs=logprobs.astype(np.float32, copy=False).tobytes(),
            policy_version=policy_version,
            temperature=temperature,
            serial=self._num_added,
        )
        self._num_added += 1
        self._of_prompt.setdefault(completion.prompt_key, []).append(completion)
        self._order.append(completion)
        self.num_tokens += completion.num_tokens + ENTRY_TOKENS
        while self.num_tokens > self._max_tokens:
            self._evict()

    def lookup(
        self, token_ids: TokenIds, trained: Mask, *, claim: bool, logprobs_hint: Floats | None = None
    ) -> Provenance | None:
        """What is known about a sequence [T]; None (a miss) unless every trained token was sampled here, after exactly
        the tokens before it. `claim` marks its completions as returned. `logprobs_hint` [T] tells equal completions
        of different weights apart."""
        raw = token_ids.astype(np.int32, copy=False).tobytes()
        hint = b"" if logprobs_hint is None else logprobs_hint.astype(np.float32, copy=False).tobytes()
        logprobs = np.zeros(len(token_ids), dtype=np.float32)
        found: list[LedgerEntry] = []
        for start, end in _spans(trained):
            parts = self._cover(raw, hint, start, end)
            if parts is None:
                self.misses += 1
                return None
            for part in parts:
                known = np.frombuffer(part.logprobs, dtype=np.float32)[: end - start]
                logprobs[start : start + len(known)] = known
                start += len(known)
            found += parts
        if not found:
            self.misses += 1
            return None
        self.hits += 1
        temperatures = {part.temperature for part in found}
        provenance = Provenance(
            policy_version=min(part.policy_version for part in found),
            logprobs=logprobs,
            temperature=temperatures.pop() if len(temperatures) == 1 else None,
            returned_before=all(part.claimed for part in found),
            key=f"{self._name}-{found[0].serial}",
        )
        if claim:
            for part in found:
                part.claimed = True
        return provenance

    def _cover(self, raw: bytes, hint: bytes, start: int, end: int) -> list[LedgerEntry] | None:
        """Completions that, laid end to end, give tokens start..end of a sequence; the last one may be longer."""
        path: list[LedgerEntry] = []  # one less than `open`
        open_: list[tuple[int, Iterator[LedgerEntry]]] = [(start, self._candidates(raw, hint, start, end))]
        failed: set[int] = set()
        while open_:
            position, candidates = open_[-1]
            candidate = next(candidates, None)
            if candidate is None:
                failed.add(position)
                open_.pop()
                if path:
                    path.pop()
                continue
            behind = position + candidate.num_tokens
            if behind >= end:
                return [*path, candidate]
            if behind not in failed:
                path.append(candidate)
                open_.append((behind, self._candidates(raw, hint, behind, end)))
        return None

    def _candidates(self, raw: bytes, hint: bytes, start: int, end: int) -> Iterator[LedgerEntry]:
        """Completions of the prompt raw[:start] that agree with what follows, best first. Better, in this order, is one
        with the hint's logprobs, one that has not been returned, one that covers more, one that was not cut, and a
        newer one (an older equal one was probably for evaluation, or its environment dropped its group)."""
        rest = raw[start * _ID_BYTES : end * _ID_BYTES]
        fitting = [
            completion
            for completion in reversed(self._of_prompt.get(_key(raw[: start * _ID_BYTES]), ()))
            if rest.startswith(completion.token_ids) or completion.token_ids.startswith(rest)
        ]
        wanted = hint[start * _LOGPROB_BYTES : end * _LOGPROB_BYTES]

        def rank(known: LedgerEntry) -> tuple[bool, bool, int, int]:
            size = min(len(known.token_ids), len(rest))  # of what both have, in bytes
            is_other = known.logprobs[:size] != wanted[:size]
            return is_other, known.claimed, -size, len(known.token_ids)

        fitting.sort(key=rank)
        return iter(fitting)

    def _evict(self) -> None:
        oldest = self._order.popleft()
        same_prompt = self._of_prompt[oldest.prompt_key]
        same_prompt.pop(0)
        if not same_prompt:
            del self._of_prompt[oldest.prompt_key]
        self.num_tokens -= oldest.num_tokens + ENTRY_TOKENS
        self.evicted += 1


def _key(prompt: bytes) -> bytes:
    """A 128-bit hash: prompts never share one by chance, and completions are compared in full."""
    return xxhash.xxh3_128_digest(prompt)


def _spans(trained: Mask) -> list[tuple[int, int]]:
    """[start, end) of each run of trained tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], trained, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
