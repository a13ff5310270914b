"""From what environments sent to typed groups. An invalid group is dropped and counted by reason."""

import hashlib
import logging
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import numpy as np

from atropos_exp.errors import EngineError
from atropos_exp.interfaces import Ledger
from atropos_exp.parts.atropos.lookahead import Arrived, LookAhead
from atropos_exp.parts.atropos.scored_data import Rejected, ScoredGroup, ScoredSequence, read_group
from atropos_exp.types import Finish, Provenance, Rollout, RolloutGroup

log = logging.getLogger(__name__)

REMEMBERED_GROUPS = 8192  # whose digests are kept, for repeated groups that the ledger does not know
LOGPROB_TOLERANCE = 1e-3  # nats between an environment's logprob and the sampler's


@dataclass(frozen=True, slots=True, eq=False)
class Unreadable:
    """A group that was refused for what it holds."""

    why: Rejected
    num_sequences: int  # that it seems to have


@dataclass(eq=False)
class Intake:
    """Validates groups and completes them from the ledger. `counters` are totals of this process.

    Example: if `raw` is a ScoredData of two sequences, `accept([read(raw)], policy_version=4)` returns one group of two
    rollouts with the versions and logprobs that the ledger knows; if a mask is wrong, it returns [] and counts
    `groups_dropped_mask_value`.
    """

    ledger: Ledger
    _: KW_ONLY
    vocab_size: int
    max_tokens: int  # of a whole sequence
    group_size: int
    stop_token_ids: Sequence[int]
    max_version_lag: int | None  # groups sampled more versions ago are dropped; None: no limit
    max_response: int  # tokens after which the run cuts a completion
    examples: dict[str, str] = field(default_factory=dict)  # the first group that was dropped, by reason
    dropped_rollouts: Counter[str] = field(default_factory=Counter)  # by reason; the source reads and clears it
    counters: Counter[str] = field(default_factory=Counter)
    _seen: OrderedDict[bytes, None] = field(default_factory=OrderedDict)
    _said: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._ahead = LookAhead(self._look_up)

    def read(self, raw: Any) -> Arrived | Unreadable:
        """What is in a group as an environment sent it; the ledger is asked about it meanwhile."""
        try:
            return self._ahead.add(read_group(raw, vocab_size=self.vocab_size, max_tokens=self.max_tokens))
        except Rejected as rejected:
            return Unreadable(rejected, _num_sequences(raw))

    def accept(self, groups_read: Sequence[Arrived | Unreadable], *, policy_version: int) -> list[RolloutGroup]:
        """The valid groups among those that were `read`, in order. `policy_version` is that of the weights to be
        trained next."""
        self.counters["groups_received"] += len(groups_read)
        groups = []
        for one in groups_read:
            if isinstance(one, Unreadable):
                self._drop(one.why, one.num_sequences)
                continue
            try:
                groups += self._complete(one.group, self._ahead.provenances(one), policy_version)
            except Rejected as rejected:
                self._drop(rejected, sum(sequence.dropped is None for sequence in one.group.sequences))
        self.counters["groups_accepted"] += len(groups)
        return groups

    def not_stale(self, groups: Sequence[RolloutGroup], *, policy_version: int) -> list[RolloutGroup]:
        """Those of `groups` that may still be trained on by the weights of `policy_version`; the others are dropped."""
        if self.max_version_lag is None:
            return list(groups)
        kept = []
        for group in groups:
            known = [rollout.policy_version for rollout in group.rollouts if rollout.by_engine]
            lag = policy_version - min(known, default=policy_version)
            if lag > self.max_version_lag:
                text = f"sampled {lag} versions ago (atropos.max_version_lag={self.max_version_lag})"
                self._drop(Rejected("stale", text), len(group.rollouts))
                self.counters["groups_accepted"] -= 1
            else:
                kept.append(group)
        return kept

    def _look_up(self, sequences: Sequence[ScoredSequence]) -> Sequence[Provenance | None]:
        try:
            return self.ledger.lookup(
                [(sequence.token_ids, sequence.trained) for sequence in sequences],
                claim=True,
                logprobs=[sequence.logprobs for sequence in sequences],
            )
        except EngineError as error:  # the gateway is down; it is started again before the next wait
            self.counters["ledger_failures"] += 1
            log.warning("the ledger of the gateway cannot be asked: %s", error)
            return [None] * len(sequences)

    def _complete(
        self, group: ScoredGroup, provenances: Sequence[Provenance | None], policy_version: int
    ) -> list[RolloutGroup]:
        """The group without what its environment could not score, if anything is left."""
        self._note_peculiarities(group)
        self._refuse_doubled(group, provenances)
        pairs = list(zip(group.sequences, provenances, strict=True))
        reasons = Counter(sequence.dropped for sequence, _ in pairs if sequence.dropped is not None)
        self.dropped_rollouts.update(reasons)
        pairs = [pair for pair in pairs if pair[0].dropped is None]
        if not pairs:
            raise Rejected("unscored", f"its environment could score none of its rollouts ({', '.join(reasons)})")
        unknown = [
            sequence
            for sequence, provenance in pairs
            if provenance is None and not sequence.supervised  # an example to imitate is of no version
        ]
        if unknown and self.max_version_lag is not None:
            raise Rejected(
                "unknown_version",
                f"the gateway has sampled {len(pairs) - len(unknown)} of its {len(pairs)} sequences"
                f", so nobody knows how old the others are (atropos.max_version_lag={self.max_version_lag}). An "
                "environment that tokenises its texts again, or samples elsewhere, sends such groups",
            )
        rollouts = [self._rollout(sequence, provenance, policy_version) for sequence, provenance in pairs]
        first = (
            next((provenance.key for provenance in provenances if provenance is not None), None) or _digest(group).hex()
        )
        return [RolloutGroup(prompt_id=f"atropos/{group.env_id}/{first}", source="atropos", rollouts=tuple(rollouts))]

    def _rollout(self, sequence: ScoredSequence, provenance: Provenance | None, policy_version: int) -> Rollout:
        logprobs, temperature = sequence.logprobs, sequence.temperature
        sampled_by = policy_version
        if provenance is None:
            if not sequence.supervised:
                self.counters["rollouts_of_unknown_version"] += 1
        else:
            self.counters["rollouts_returned_before"] += int(provenance.returned_before)
            sampled_by = min(provenance.policy_version, policy_version)
            if provenance.temperature is None:
                raise Rejected("mixed_temperature", "completions of one sequence were sampled at several temperatures")
            temperature = provenance.temperature
            if logprobs is None:
                self.counters["logprobs_from_ledger"] += 1
                logprobs = provenance.logprobs
            elif (
                logprobs is not provenance.logprobs
                and float(np.abs(logprobs - provenance.logprobs).max()) > LOGPROB_TOLERANCE
            ):
                self.counters["logprobs_corrected"] += 1
                self._say(
                    "logprobs", "an environment sends other logprobs than its sampler gave; the sampler's are used"
                )
                logprobs = provenance.logprobs
        if logprobs is None:
            self.counters["rollouts_without_logprobs"] += 1
        return Rollout(
            token_ids=sequence.token_ids,
            trained=sequence.trained,
            logprobs=logprobs,
            reward=sequence.score,
            finish=Finish.LENGTH if self._is_cut(sequence) else Finish.STOP,
            policy_version=sampled_by,
            advantages=sequence.advantages,
            zero_advantage=sequence.zero_advantage,
            reference_logprobs=sequence.reference_logprobs,
            temperature=temperature,
            supervised=sequence.supervised,
            by_engine=provenance is not None,
        )

    def _is_cut(self, sequence: ScoredSequence) -> bool:
        """Whether a limit of the run ended it. A stop string or a limit of the environment's own is its wish."""
        end = len(sequence.trained) - int(np.argmax(sequence.trained[::-1]))  # of its last completion
        if int(sequence.token_ids[end - 1]) in self.stop_token_ids:
            return False
        start = end - int(np.argmin(sequence.trained[:end][::-1]))  # the first token of a sequence is never trained
        return end == self.max_tokens or end - start == self.max_response

    def _refuse_doubled(self, group: ScoredGroup, provenances: Sequence[Provenance | None]) -> None:
        """Raise Rejected if the group came before. The ledger tells a repeated group from an equal one that was sampled
        again. One that it does not know is repeated if an equal one had the same logprobs; without logprobs, short
        answers may well be equal. Examples to imitate come again in every epoch."""
        if all(sequence.supervised for sequence in group.sequences):
            return
        if all(provenance is not None for provenance in provenances):
            if all(provenance is not None and provenance.returned_before for provenance in provenances):
                raise Rejected("doubled", "every completion in it came back before")
            return
        digest = _digest(group)
        if digest in self._seen:
            if all(sequence.logprobs is not None for sequence in group.sequences):
                raise Rejected("doubled", "an equal group with the same logprobs came before")
            self.counters["groups_repeated"] += 1
        self._seen[digest] = None
        if len(self._seen) > REMEMBERED_GROUPS:
            self._seen.popitem(last=False)

    def _note_peculiarities(self, group: ScoredGroup) -> None:
        if len(group.sequences) != self.group_size:
            self.counters["groups_of_other_size"] += 1
            self._say(
                f"size {len(group.sequences)}",
                f"a group of {len(group.sequences)} rollouts (group_size is {self.group_size}): compared as it is",
            )
        for name in group.unknown:
            self.counters["unknown_fields"] += 1
            self._say(name, f"environments send `{name}`, which this trainer does not know and does not follow")

    def _drop(self, rejected: Rejected, num_rollouts: int) -> None:
        self.counters[f"groups_dropped_{rejected.reason}"] += 1
        self.dropped_rollouts[rejected.reason] += num_rollouts
        self.examples.setdefault(rejected.reason, str(rejected))
        self._say(
            rejected.reason, f"a group from an environment is dropped, {rejected} (further ones are only counted)"
        )

    def _say(self, what: str, text: str) -> None:
        if what not in self._said:
            self._said.add(what)
            log.warning("%s", text)


def _digest(group: ScoredGroup) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for sequence in group.sequences:
        logprobs = np.zeros(0) if sequence.logprobs is None else sequence.logprobs
        for part in (sequence.token_ids, sequence.trained, logprobs, np.float64(sequence.score)):
            raw = part.tobytes()
            digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.digest()


def _num_sequences(raw: object) -> int:
    """How many rollouts a group that cannot be read seems to have, at least 1."""
    tokens = raw.get("tokens") if isinstance(raw, dict) else None
    return max(1, len(tokens)) if isinstance(tokens, list) else 1
