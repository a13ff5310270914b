"""Weight updates of the vLLM server: the account, the workers, and the proof that no old key or value is left."""

from collections.abc import Mapping

import numpy as np

from atropos_exp.errors import Refused
from atropos_exp.parts.engine.vllm.core import Core
from atropos_exp.parts.engine.vllm.worker import agreed
from atropos_exp.processes.wire import Message
from atropos_exp.types import TokenIds
from atropos_exp.weights.account import UpdateAccount
from atropos_exp.weights.receiver import BucketSource


class WorkerUpdate:
    """Loads into the workers of `core` what `account` admits.

        update.begin(7)
        update.load(message)  # for every bucket
        update.finish()  # version 7 is served

    Nothing may be in flight. What does not fit raises Refused.
    """

    def __init__(
        self, core: Core, account: UpdateAccount, source: BucketSource, *, block_size: int, max_sequence_length: int
    ) -> None:
        """`block_size`: tokens of one block of keys and values, the unit of the prefix cache."""
        self._core = core
        self._account = account
        self._source = source
        self._tied: set[str] = set()  # names that came in this update and own no tensor
        self._on_device = False  # the last bucket came in device memory
        # A prompt of one whole block and a token: its block is cached when it is drawn from. Where no prompt can have
        # a whole block, nothing is ever cached.
        fits = block_size + 1 <= max_sequence_length
        self._sentinel: TokenIds | None = np.zeros(block_size + 1, dtype=np.int32) if fits else None
        self.num_resident = 0  # of the last digests, those of tensors that the model uses
        self.num_cache_proofs = 0
        self._asleep: list[str] = []  # what vLLM has no memory for
        self.is_plain = False  # the last update went straight into the parameters, without a reload layer by layer

    @property
    def is_asleep(self) -> bool:
        """Whether the memory of weights, keys or values is released."""
        return bool(self._asleep)

    def sleep(self) -> Message:
        """Release the memory until the next update, whose `begin` wakes the weights, and its `finish` keys and values.
        Bytes in use on all GPUs before and after."""
        if not self._core.can_sleep:
            raise Refused(400, "this engine was started without engine.colocate=true")
        if self._account.is_open:
            raise Refused(409, "an update is in progress")
        before = sum(self._core.ask_workers("atropos_memory"))
        if not self._asleep:
            self._account.fall_asleep()
            self._asleep = ["weights", "kv_cache"]
            self._core.sleep()
        return {"bytes_before": before, "bytes_after": sum(self._core.ask_workers("atropos_memory"))}

    def begin(self, version: int) -> None:
        """Start an update, whatever became of the last one."""
        self._account.begin(version)
        if self._sentinel is not None and self._account.problem is None:
            with self._account.spent("prefixes"):
                self._core.draw(self._sentinel)
        self._wake("weights")
        self._tied = set()
        self._account.mark_incomplete()  # vLLM may take its layers apart for the time of the update
        with self._account.spent("begin"):
            self._core.ask_workers("atropos_begin", self._account.kinds)

    def load(self, message: Message) -> None:
        """Load one bucket in every worker."""
        kinds = self._source.kinds(message)
        for name, kind in kinds:
            self._account.admit(name, kind)
        tied = tuple(self._account.aliases)
        self._on_device = self._source.on_device
        with self._account.spent("load"):
            self.is_plain = all(self._core.ask_workers("atropos_load", self._source, message, tied))
        for name, _ in kinds:
            self._account.received(name)
            if name in self._account.aliases:
                self._tied.add(name)

    def finish(self) -> None:
        """Accept the update if every tensor has arrived and no old key or value can be read any more."""
        try:
            self._account.check_complete()
            self._check_tied()
            with self._account.spent("finish"):
                self._core.ask_workers("atropos_end")
            if self._account.adapter:
                self._core.serve_adapter()
            self._wake("kv_cache")  # not before: a reload may need the room
            with self._account.spent("prefixes"):
                self._forget_prefixes()
        except Exception:
            self.abort()
            raise
        self._account.finish()

    def abort(self) -> None:
        """Abandon the update; layers that were taken apart are put together again."""
        if self._account.is_open:
            self._account.abort()
        self._core.ask_workers("atropos_end")

    def digests(self, *, on_device: bool) -> Mapping[str, str]:
        """The digest of every expected tensor that has arrived, by name."""
        with self._account.spent("digests"):
            held = agreed(self._core.ask_workers("atropos_digests", on_device))
        self.num_resident = sum(is_resident for name, (_, is_resident) in held.items() if name not in self._tied)
        return {name: value for name, (value, _) in held.items() if name not in self._tied}

    def _wake(self, tag: str) -> None:
        if tag in self._asleep:
            with self._account.spent("wake"):
                self._core.wake(tag)
            self._asleep.remove(tag)

    def _check_tied(self) -> None:
        if not self._tied:
            return
        held = agreed(self._core.ask_workers("atropos_digests", self._on_device))
        for alias in self._tied:
            owner = self._account.aliases[alias]
            if held[alias][0] != held[owner][0]:
                raise Refused(400, f"{alias} is tied to {owner}, but the two were sent with different values")

    def _forget_prefixes(self) -> None:
        """Empty the prefix cache, and see that it is: a prompt that was in it must not be found there."""
        self._core.forget_prefixes()
        if self._sentinel is None:
            return
        _, _, num_cached = self._core.draw(self._sentinel)
        if num_cached:
            raise Refused(
                500,
                f"the prefix cache still gives keys and values of the weights before this update: {num_cached} tokens "
                "of a prompt were found in it after the reset",
            )
        self.num_cache_proofs += 1
