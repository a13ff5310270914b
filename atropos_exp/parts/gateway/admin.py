"""The routes that only the trainer may call: ledger, hold, counters. Their messages are those of `wire.py`."""

from dataclasses import dataclass

import numpy as np

from atropos_exp.parts.gateway.counters import Counters, resident_bytes
from atropos_exp.parts.gateway.gate import Gate
from atropos_exp.parts.gateway.ledger import CompletionLedger
from atropos_exp.parts.gateway.refusal import Refusal
from atropos_exp.processes.wire import Message, split


@dataclass(frozen=True, kw_only=True, eq=False)
class Admin:
    """Answers the trainer's requests; each method is named after its route."""

    ledger: CompletionLedger
    gate: Gate
    counters: Counters
    incarnation: int

    def check(self, message: Message) -> None:
        """Raise Refusal for a message to an earlier process: it may have waited in the trainer's socket since then."""
        if message.get("incarnation") != self.incarnation:
            raise Refusal(400, "value", f"meant for process {message.get('incarnation')}, not {self.incarnation}")

    def lookup(self, message: Message) -> Message:
        """What the ledger knows about each sequence, in order: of two equal ones the second sees the first's claim.
        Logprobs that equal the ones that came are None in the answer."""
        lengths, has_logprobs = message["lengths"], message["has_logprobs"]
        sequences = zip(split(message["token_ids"], lengths), split(message["trained"], lengths), strict=True)
        hints = iter(split(message["logprobs"], lengths[has_logprobs]))
        found: list[Message | None] = []
        for (token_ids, trained), has_hint in zip(sequences, has_logprobs.tolist(), strict=True):
            hint = next(hints) if has_hint else None
            known = self.ledger.lookup(token_ids, trained, claim=message["claim"], logprobs_hint=hint)
            if known is None:
                found.append(None)
                continue
            same = hint is not None and np.array_equal(known.logprobs, hint)
            found.append(
                {
                    "policy_version": known.policy_version,
                    "logprobs": None if same else known.logprobs,
                    "temperature": known.temperature,
                    "returned_before": known.returned_before,
                    "key": known.key,
                }
            )
        return {"found": found}

    def hold(self, message: Message) -> Message:
        """Make new requests wait, and report how many are in flight."""
        self.gate.hold()
        return {"in_flight": self.counters.in_flight}

    def release(self, message: Message) -> Message:
        """Let the waiting requests go on, and report how many are in flight."""
        self.gate.release()
        return {"in_flight": self.counters.in_flight}

    def values(self) -> dict[str, float]:
        """The present value of every counter, by its name."""
        ledger = self.ledger
        return {
            **self.counters.totals,
            "held_seconds": self.counters.totals["held_seconds"] + self.gate.held_seconds,
            "ledger_hits": ledger.hits,
            "ledger_misses": ledger.misses,
            "ledger_evicted": ledger.evicted,
            "in_flight": self.counters.in_flight,
            "max_in_flight": self.counters.max_in_flight,
            "holding": int(self.gate.is_holding),
            "ledger_entries": len(ledger),
            "ledger_tokens": ledger.num_tokens,
            "rss_bytes": resident_bytes(),
        }
