"""What stands behind the routes of an engine server: one protocol, whichever library holds the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from atropos_exp.processes.wire import Message
from atropos_exp.types import SamplingParams, Scored, TokenIds


class Backend(Protocol):
    """Every method returns at once; what takes time is a future. `deadline` is one of time.monotonic()."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_sequence_length(self) -> int: ...

    def generate(
        self,
        prompts: Sequence[TokenIds],
        params: SamplingParams,
        *,
        num_samples: int,
        first_prompt: int,
        deadline: float,
    ) -> Future[Message]:
        """`token_ids`, `logprobs` laid end to end, and `lengths`, `stopped`, `versions` of all samples in order.
        `first_prompt`: the place of the first one in a call of which this is a part; rows get their seeds by it."""
        ...

    def score(
        self, sequences: Sequence[TokenIds], *, temperature: float, num_top: int, deadline: float
    ) -> Future[list[Scored]]:
        """Every sequence [T] under the model, with the `num_top` likeliest tokens (at most the vocabulary)."""
        ...

    def probe(self, *, deadline: float) -> Future[Message]:
        """One real token as a sign of health, also while paused: `token_id`, `version`."""
        ...

    def info(self) -> Message:
        """`version`, `problem` and whatever else this backend counts."""
        ...

    def expected(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """name -> (dtype, shape) of every tensor an update must bring."""
        ...

    def pause(self, *, deadline: float) -> Future[Any]:
        """Hold generations from now on; the result comes when none is in flight."""
        ...

    def resume(self) -> None: ...

    def sleep(self, *, deadline: float) -> Future[Message]:
        """Give the device's memory back until the next update, which wakes the model: `bytes_before` and `bytes_after`
        in use on the device, whoever holds them. Nothing is sampled in between. Raises Refused where it cannot."""
        ...

    def begin(self, version: int, *, deadline: float) -> Future[Any]: ...

    def load(self, message: Message, *, deadline: float) -> Future[Any]:
        """One bucket of the update, wherever its transport left it."""
        ...

    def finish(self, *, deadline: float) -> Future[Any]: ...

    def abort(self, *, deadline: float) -> Future[Any]: ...

    def digests(self, *, on_device: bool, deadline: float) -> Future[Mapping[str, str]]:
        """Of each expected tensor as the model holds it."""
        ...

    def is_moving(self) -> bool:
        """False: a step of the model takes longer than it may, so the client is no longer told to wait."""
        ...
