"""What an engine server's routes call: one protocol, whichever library holds the model."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from atropos_exp.processes.wire import Message
from atropos_exp.types import SamplingParams, TokenIds, TokenScores


class Backend(Protocol):
    """A model behind an engine server. Every method returns at once; what takes time is a future, which raises Refused
    for what cannot be done. `deadline` is a value of time.monotonic().

        future = backend.generate(prompts, params, num_samples=8, first_prompt=0, deadline=time.monotonic() + 60)
        future.result()["lengths"]  # [len(prompts) * 8]
    """

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""

    @property
    def hub_names(self) -> bool:
        """Whether an update brings tensors as the model's files have them, or else as transformers' modules do."""

    @property
    def max_sequence_length(self) -> int:
        """The most tokens that a prompt and its completion have together."""

    def generate(
        self,
        prompts: Sequence[TokenIds],
        params: SamplingParams,
        *,
        num_samples: int,
        first_prompt: int,
        deadline: float,
    ) -> Future[Message]:
        """All samples in order: `token_ids` and `logprobs` concatenated, and `lengths`, `stopped` and `versions` [N].
        `first_prompt`: the place of the first prompt in the call of which this is a part, which decides the seeds."""

    def score(
        self, sequences: Sequence[TokenIds], *, temperature: float, num_top: int, deadline: float
    ) -> Future[list[TokenScores]]:
        """Every sequence's logprobs under the model, and the `num_top` likeliest tokens at each of its places."""

    def probe(self, *, deadline: float) -> Future[Message]:
        """Generate one token as a sign of health, also while paused: `token_id` and `version`."""

    def info(self) -> Message:
        """The served `version`, the `problem` with the weights or None, and what else this backend counts."""

    def expected(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """name -> (dtype, shape) of every tensor that the next update must bring."""

    def pause(self, *, deadline: float) -> Future[Any]:
        """Hold generations from now on. The result comes when none is in flight."""

    def resume(self) -> None:
        """Sample again after `pause`."""

    def sleep(self, *, deadline: float) -> Future[Message]:
        """Release the device's memory until the next update, which wakes the model: `bytes_before` and `bytes_after` in
        use on the device, by all processes. Nothing is sampled in between. Raises Refused where it cannot."""

    def begin(self, version: int, *, deadline: float) -> Future[Any]:
        """Start the update to this version."""

    def load(self, message: Message, *, deadline: float) -> Future[Any]:
        """Load one bucket of the update. `message`: where it is, from the sender's transport."""

    def finish(self, *, deadline: float) -> Future[Any]:
        """Accept the update and serve its version. Refused if a tensor is missing."""

    def abort(self, *, deadline: float) -> Future[Any]:
        """Abandon the update. Nothing is sampled until a complete one has arrived, if it changed any weight."""

    def digests(self, *, on_device: bool, deadline: float) -> Future[Mapping[str, str]]:
        """name -> digest of each expected tensor as the model holds it. `on_device`: computed on the GPU."""

    def is_moving(self) -> bool:
        """False if a step of the model takes longer than it may: waiting clients then get no more heartbeats."""
