"""Publishes the trainer's weights to the engine after an update, and proves that they arrived.

One sync: the engine opens an update; tensors are gathered from all ranks, cast and sent in buckets; the engine's
digests are compared with the sender's, and it commits; then the canary's logprobs must agree.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from atropos_exp.errors import EngineError, SyncError
from atropos_exp.interfaces import Engine, PolicyTrainer, WeightReceiver
from atropos_exp.processes.ranks import Ranks
from atropos_exp.types import Floats, SyncStats, TokenIds
from atropos_exp.weights.expectation import Expectation
from atropos_exp.weights.proof import SentTensors, check_canary, check_complete, check_digests, check_finite
from atropos_exp.weights.recheck import Mode, Recheck
from atropos_exp.weights.tensors import Kind, is_adapter, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

# Parts of a sync's time: pause the engine, gather and cast, send and load, commit; and the three proofs.
TRANSFER = ("open", "gather", "send", "commit")
PROOF = ("recheck", "digest", "canary")


class WeightPublisher:
    """A `Publisher`. Collective: every rank calls `publish`; rank 0 alone talks to the engine.

        publisher = WeightPublisher(trainer, engine, is_rank_zero=True, bucket_bytes=1 << 28, canary=prompts,
                                    temperature=1.0, tolerance=None)
        stats = publisher.publish(7)  # from now on the engine samples with the trainer's weights, as version 7

    The tensors are gathered one by one, cast to the engine's dtype and sent in buckets, so that no rank holds more than
    one bucket besides its shards. Before the engine commits, names, shapes, dtypes, bytes and digests of what it holds
    are compared with what was sent. Afterwards comes the canary: for fixed prompts the engine must give the trainer's
    logprobs, as nearly as it did in the first syncs, and move with them. A failed proof leaves the engine refusing to
    sample, and raises SyncError on every rank.
    """

    def __init__(
        self,
        trainer: PolicyTrainer,
        engine: Engine | None,
        *,
        is_rank_zero: bool,
        bucket_bytes: int,
        canary: Sequence[TokenIds],
        temperature: float,
        tolerance: float | None,
        recheck: Mode,
    ) -> None:
        """`engine`: rank 0's; None elsewhere. `bucket_bytes`: size of a bucket, unless one tensor is larger. `canary`:
        sequences of two or more tokens. `temperature`: of its logprobs. `tolerance`: of its mean gap, in nats; None: by
        the engine's dtype and what the first syncs show (`Expectation`). `recheck`: whether what the engine holds is
        compared once more before it changes; auto: where that costs little."""
        assert (engine is not None) == is_rank_zero
        assert canary and all(len(prompt) > 1 for prompt in canary) and bucket_bytes > 0
        self._trainer = trainer
        self._engine = engine
        self._bucket_bytes = bucket_bytes
        self._canary = canary
        self._temperature = temperature
        self._expectations = (  # of each server
            [] if engine is None else [Expectation(engine.dtype, tolerance=tolerance) for _ in engine.replicas]
        )
        self._recheck = None if engine is None else Recheck(engine, mode=recheck)
        self.num_syncs = 0  # that have begun
        self.num_verified = 0  # that have been proven

    def recheck(self, *, before: int) -> None:
        """Compare what the engine holds with what was proven last, once, before the sync to that version. Raises
        WrongSampler, and EngineError if the engine fails."""
        with Ranks.of_group().same_outcome("the comparison of what the engine holds"):
            if self._recheck is not None:
                self._recheck.check(before=before)

    def publish(self, version: int) -> SyncStats:
        """Make the engine serve the trainer's weights as `version`. Raises SyncError if they do not provably arrive,
        WrongSampler if those of the last sync were no longer there, and EngineError if the engine fails."""
        timer = PartTimer()
        self.recheck(before=version)
        timer.book("recheck")
        self.num_syncs += 1
        ranks = Ranks.of_group()
        with ranks.same_outcome(f"the weight sync to version {version}"):
            sent, compared = self._transfer(version, timer)
        with ranks.same_outcome(f"the proof of the weight sync to version {version}"), self._scored_canary() as scores:
            ours = self._trainer.logprobs(self._canary, temperature=self._temperature)
            largest, mean, allowed = self._check_canary(version, ours, scores, has_digests=compared > 0)
            timer.book("canary")
            if self._recheck is not None:
                self._recheck.begin(version)
        stats = ranks.broadcast(
            SyncStats(
                policy_version=version,
                num_tensors=len(sent.kinds),
                num_bytes=sent.num_bytes,
                seconds=sum(timer.seconds[part] for part in TRANSFER),
                proof_seconds=sum(timer.seconds[part] for part in PROOF),
                seconds_by_part=timer.seconds,
                canary_gap_max=largest,
                canary_gap_mean=mean,
                canary_gap_allowed=allowed,
                digests_compared=compared,
            )
        )
        self.num_verified += 1
        return stats

    def _transfer(self, version: int, timer: PartTimer) -> tuple[SentTensors, int]:
        """Send every tensor and compare what the engine then holds; the number of digests compared."""
        sent = SentTensors()
        compared = 0
        with contextlib.ExitStack() as update:
            receiver: WeightReceiver | None = None
            with Ranks.of_group().same_outcome(f"the begin of the weight sync to version {version}"):
                if self._engine is not None:
                    receiver = update.enter_context(self._engine.updating(version))
            parameters = self._needed(receiver)
            timer.book("open")
            try:
                if receiver is not None:
                    given = self._trainer.on_hub(parameters) if receiver.hub_names else parameters
                    for bucket in self._buckets(given, sent, receiver.expected()):
                        timer.book("gather")
                        sent.digests.add(bucket)
                        timer.book("digest")
                        receiver.receive(bucket)
                        timer.book("send")
                    timer.book("gather")
                    compared = self._compare(receiver, sent)
                    timer.book("digest")
            finally:
                # The gathering is collective: the other ranks need this one to the end, also when the engine failed.
                for _ in parameters:
                    pass
        timer.book("commit")
        return sent, compared

    def _needed(self, receiver: WeightReceiver | None) -> Iterator[tuple[str, Tensor]]:
        """The tensors that the engine expects, which every rank has to gather: all weights with LoRA merged, or LoRA's
        matrices by themselves, with or without the base that they adapt."""
        names = [] if receiver is None else list(receiver.expected())
        kinds = (any(map(is_adapter, names)), not all(map(is_adapter, names)))
        has_adapter, has_base = Ranks.of_group().broadcast(kinds)
        return self._trainer.adapter(with_base=has_base) if has_adapter else self._trainer.parameters()

    def _buckets(
        self, parameters: Iterator[tuple[str, Tensor]], sent: SentTensors, expected: Mapping[str, Kind]
    ) -> Iterator[list[tuple[str, Tensor]]]:
        """Cast tensors in groups of at most `bucket_bytes`; a larger tensor goes alone. Each gets the dtype that the
        engine keeps it in, which is not the engine's own for some gates and all whole numbers."""
        assert self._engine is not None
        others = {name: torch_dtype(dtype) for name, (dtype, _) in expected.items()}
        usual = torch_dtype(self._engine.dtype)
        bucket: list[tuple[str, Tensor]] = []
        num_bytes = 0
        for name, full in parameters:
            tensor = full.detach().to(
                others.get(name, usual)
            )  # cast first: half the bytes leave the device, if they have to
            if not self._engine.transfers_on_device:
                tensor = tensor.cpu()
            sent.add(name, tensor)
            if bucket and num_bytes + tensor.nbytes > self._bucket_bytes:
                yield bucket
                bucket, num_bytes = [], 0
            bucket.append((name, tensor))
            num_bytes += tensor.nbytes
        if bucket:
            yield bucket

    def _compare(self, receiver: WeightReceiver, sent: SentTensors) -> int:
        expected = receiver.expected()
        check_complete(sent.kinds, expected)
        start = time.perf_counter()
        held = receiver.digests()  # requested while the device may still be computing ours
        assert self._recheck is not None
        self._recheck.note(held, seconds=time.perf_counter() - start)
        return check_digests(sent.digests.read(), held, expected)

    @contextlib.contextmanager
    def _scored_canary(self) -> Iterator[list[Future[list[Floats]]]]:
        """The canary's logprobs by every server, which computes them while the trainer does."""
        replicas = self._engine.replicas if self._engine is not None else []
        with ThreadPoolExecutor(max(1, len(replicas)), thread_name_prefix="canary") as pool:
            yield [pool.submit(one.score, self._canary, temperature=self._temperature) for one in replicas]

    def _check_canary(
        self, version: int, ours: Sequence[Floats], scores: Sequence[Future[list[Floats]]], *, has_digests: bool
    ) -> tuple[float, float, float]:
        """Largest and mean gap on rank 0, and what the mean may be; zeros elsewhere."""
        if self._engine is None:
            return 0.0, 0.0, 0.0
        wait(scores)  # each has its deadline; a server that dies of this is dead before it is asked to stop sampling
        try:
            check_finite(ours)  # before the engine's scores: it may not have survived such weights
            gaps, allowed = [], min(expectation.allowed.mean for expectation in self._expectations)
            for number, (score, expectation) in enumerate(zip(scores, self._expectations, strict=True)):
                theirs = score.result()
                try:
                    gaps.append(check_canary(self._canary, ours, theirs, allowed=expectation.allowed, version=version))
                    expectation.follow(ours, theirs, version=version)
                except SyncError as error:
                    which = f"server {number}: " if len(self._engine.replicas) > 1 else ""
                    raise SyncError(f"{which}{error}") from None
            serves = self._engine.version()
            if serves != version:
                raise SyncError(f"the engine says that it serves version {serves} after the sync to version {version}")
            if has_digests:
                for score, expectation in zip(scores, self._expectations, strict=True):
                    expectation.learn(ours, score.result(), version=version)
            return max(largest for largest, _ in gaps), sum(mean for _, mean in gaps) / len(gaps), allowed
        except SyncError as error:
            self._quarantine(version, error)
            raise

    def _quarantine(self, version: int, error: SyncError) -> None:
        """Open an update and abort it, which leaves the engine refusing to sample: no token comes from unproven
        weights."""
        assert self._engine is not None
        try:
            with contextlib.suppress(SyncError), self._engine.updating(version):
                raise SyncError("abort this update")
        except EngineError as also:
            error.add_note(f"the engine could not be told to stop sampling: {also}")


class PartTimer:
    """Seconds by part of a sync. A device computes on after the call that started it, so what a GPU takes to gather and
    digest is booked where the next call waits for it, under `send`."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys((*TRANSFER, *PROOF), 0.0)
        self._last = time.perf_counter()

    def book(self, part: str) -> None:
        """Add the time since the last call to this part."""
        now = time.perf_counter()
        self.seconds[part] += now - self._last
        self._last = now
