"""The gateway's ledger, for tests that need no gateway."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from atropos_exp.errors import EngineError
from atropos_exp.parts.gateway.ledger import CompletionLedger
from atropos_exp.types import Floats, Mask, Provenance, TokenIds


class Book:
    """The gateway's ledger without the gateway. `is_down`: nobody answers."""

    def __init__(self) -> None:
        self.ledger = CompletionLedger(max_tokens=100_000, name="book")
        self.is_down = False

    def sampled(
        self, prompt: list[int], tokens: list[int], *, version: int = 0, temperature: float = 1.0, logprob: float = -0.5
    ) -> None:
        self.ledger.add(
            np.array(prompt, np.int32),
            np.array(tokens, np.int32),
            np.full(len(tokens), logprob, np.float32),
            policy_version=version,
            temperature=temperature,
        )

    def lookup(
        self,
        sequences: Sequence[tuple[TokenIds, Mask]],
        *,
        claim: bool,
        logprobs: Sequence[Floats | None] | None = None,
    ) -> list[Provenance | None]:
        if self.is_down:
            raise EngineError("gateway: nobody answers")
        hints = logprobs or [None] * len(sequences)
        return [
            self.ledger.lookup(ids, trained, claim=claim, logprobs_hint=hint)
            for (ids, trained), hint in zip(sequences, hints, strict=True)
        ]
