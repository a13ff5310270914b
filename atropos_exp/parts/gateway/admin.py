"""The routes that only the trainer may call: ledger, hold, counters. Their messages are those of `wire.py`."""

from dataclasses import dataclass

import numpy as np

from atropos_exp.parts.gateway.counters import Counters, resident_bytes
from atropos_exp.parts.gateway.gate import Gate
from atropos_exp.parts.gateway.ledger import CompletionLedger
from atropos_exp.parts.gateway.refusal import Refusal
from atropos_exp.processes.wire import Message, flatten, split
from atropos_exp.types import Provenance


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
        """What the ledger knows about each sequence, in order: of two equal ones the second sees the first's claim."""
        sequences = split(message["token_ids"], message["lengths"])
        masks = split(message["trained"], message["lengths"])
        hints = split(message["logprobs_hint"], message["lengths"])
        found = [
            self.ledger.lookup(token_ids, trained, claim=bool(message["claim"]), logprobs_hint=hint)
            for token_ids, trained, hint in zip(sequences, masks, hints, strict=True)
        ]
        return pack_provenances(found)

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


def pack_provenances(found: list[Provenance | None]) -> Message:
    """The answer to a lookup as one message; None becomes `found` = False."""
    known = [provenance for provenance in found if provenance is not None]
    flat, lengths = flatten([provenance.logprobs for provenance in known], np.float32)
    return {
        "found": np.array([provenance is not None for provenance in found], dtype=np.bool_),
        "logprobs": flat,  # of the found ones, as everything below
        "lengths": lengths,
        "versions": np.array([provenance.policy_version for provenance in known], dtype=np.int64),
        "temperatures": np.array(
            [np.nan if provenance.temperature is None else provenance.temperature for provenance in known],
            dtype=np.float64,
        ),
        "returned_before": np.array([provenance.returned_before for provenance in known], dtype=np.bool_),
        "keys": [provenance.key for provenance in known],
    }


def unpack_provenances(message: Message) -> list[Provenance | None]:
    """The inverse of `pack_provenances`."""
    if not message["keys"]:
        return [None] * len(message["found"])
    known = iter(
        [
            Provenance(
                policy_version=version,
                logprobs=logprobs,
                temperature=None if np.isnan(temperature) else temperature,
                returned_before=returned_before,
                key=key,
            )
            for version, logprobs, temperature, returned_before, key in zip(
                message["versions"].tolist(),
                split(message["logprobs"], message["lengths"]),
                message["temperatures"].tolist(),
                message["returned_before"].tolist(),
                message["keys"],
                strict=True,
            )
        ]
    )
    return [next(known) if found else None for found in message["found"].tolist()]
