"""The verbs: what each replaceable part must do. A new part is one file that satisfies one of these + one YAML."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from atropos_exp.types import (
    Dropped,
    Endpoint,
    Floats,
    Mask,
    Prompt,
    Provenance,
    RewardFailure,
    RolloutGroup,
    Sample,
    SampleRecord,
    SamplingParams,
    StepFacts,
    StepMetrics,
    SyncStats,
    TokenIds,
    TrainBatch,
    UpdateStats,
)

if TYPE_CHECKING:
    from torch import Tensor

JSON = dict[str, Any]


class AdvantageEstimator(Protocol):
    """`conf/advantage`: how rewards of a group are compared."""

    @property
    def min_group_size(self) -> int: ...  # the fewest rollouts of a prompt that it can compare

    def __call__(self, groups: Sequence[RolloutGroup]) -> list[Floats]:
        """One float32 [G] per group, in order. Groups with environment-supplied advantages get zeros here."""


class PolicyLoss(Protocol):
    """`conf/loss`: from log-probabilities to a scalar. Rows are sequences, columns their trained tokens."""

    @property
    def kl_coef(self) -> float: ...  # of the KL term to the reference model; with 0 none is loaded

    def __call__(
        self,
        *,
        logprobs_NR: Tensor,  # of the policy being trained, with gradient
        old_logprobs_NR: Tensor,  # of the same policy before this update, detached
        advantages_NR: Tensor,
        mask_NR: Tensor,  # bool, False is padding
        importance_NR: Tensor | None,  # detached weights pi_old / behaviour, truncated; None: on-policy
        reference_logprobs_NR: Tensor | None,
        supervised_NR: Tensor | None,  # bool, whole rows of cross-entropy on their trained tokens; None: no such row
        num_tokens: int,  # trained tokens of the whole mini-batch, all ranks
        num_sequences: int,  # likewise
        dp_size: int,
    ) -> tuple[Tensor, dict[str, float]]:
        """A scalar whose sum over micro-batches and mean over ranks is the loss of the mini-batch; and
        `policy_loss`, `supervised_loss`, `clip_fraction`, `reference_kl` of this micro-batch (sums weighted like the
        loss). Supervised tokens have no part in any of these but `supervised_loss`; they count in the denominators."""


class Reward(Protocol):
    """`conf/reward`: how an answer is scored. Runs in a killable child process; must be importable and picklable."""

    def __call__(self, answer: str, prompt: Prompt) -> float: ...

    def warm_up(self) -> None:
        """Import what the first call needs, before any time limit runs."""


class Scorer(Protocol):
    """Runs a reward over many answers in killable processes (`parts/reward/pool.py`)."""

    @property
    def num_rescored(self) -> int:
        """Answers that were scored again since the process that scored them died."""

    def score(self, items: Sequence[tuple[str, Prompt]]) -> list[float | RewardFailure]: ...


class PromptLoader(Protocol):
    """`conf/data`: an endless, exactly resumable stream of prompts."""

    @property
    def counts(self) -> object:
        """What was read and what was left out, as text for the user: printed when a run starts."""

    def take(self, num_prompts: int) -> list[Prompt]: ...

    def state(self) -> JSON: ...

    def restore(self, state: JSON) -> None:
        """Continue after `state`. Raises UserError if the data changed since."""


class EngineServer(Protocol):
    """One of the servers of an engine."""

    @property
    def endpoint(self) -> Endpoint:
        """Where other processes of the run, such as the gateway, reach it."""

    def score(self, sequences: Sequence[TokenIds], *, temperature: float) -> list[Floats]:
        """For each sequence [T] the logprobs [T - 1] of tokens 1.., nats."""

    def digests(self) -> Mapping[str, str]:
        """As `WeightReceiver.digests`, of what the last update brought, as it is held now."""


class Engine(EngineServer, Protocol):
    """`conf/engine`: a client of a server process that samples from the policy."""

    @property
    def dtype(self) -> str:
        """Of the served weights: float32 | bfloat16 | float16."""

    @property
    def replicas(self) -> Sequence[EngineServer]:
        """Every server that samples: a weight sync is proven for each of them."""

    @property
    def transfers_on_device(self) -> bool:
        """Whether `WeightReceiver.receive` wants tensors on the GPU; digests are then made there too."""

    def generate(self, prompts: Sequence[TokenIds], params: SamplingParams, *, num_samples: int) -> list[list[Sample]]:
        """`num_samples` completions per prompt, in order. Same call, seed and weights: same tokens."""

    def version(self) -> int: ...

    def libraries(self) -> Mapping[str, str]:
        """Versions of what its numbers come from, such as {"vllm": "0.24.0"}: its environment may be its own."""

    def check(self) -> None:
        """Raise EngineError unless a real token can be generated within the deadline."""

    def updating(self, version: int) -> AbstractContextManager[WeightReceiver]:
        """Pause, accept weights, resume as `version`. Leaving by an exception aborts: the engine then refuses
        to generate until a complete update has arrived."""

    def sleep(self) -> tuple[int, int]:
        """Give the device's memory back until the next `updating`, which wakes it; nothing is sampled in between.
        Bytes in use on the device before and after, whoever holds them. EngineError where it cannot."""

    def restart(self) -> None:
        """After EngineLost: a fresh server at the same address. It refuses to generate until a complete update has
        arrived. Raises EngineError."""

    def stop(self) -> None: ...


class WeightReceiver(Protocol):
    """The engine's side of one weight update."""

    @property
    def hub_names(self) -> bool:
        """Whether tensors must come as the model's files on the hub have them (`PolicyTrainer.on_hub`), or else as
        transformers' modules have them."""

    def expected(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """name -> (dtype, shape) of every tensor the engine must be given in this update. Names of LoRA matrices among
        them (`weights.tensors.is_adapter`) ask for `PolicyTrainer.adapter`, nothing else for it without the base."""

    def receive(self, bucket: Sequence[tuple[str, Tensor]]) -> None:
        """Hand over one bucket of full CPU or device tensors in the engine's dtype. Returns when it is loaded."""

    def digests(self) -> Mapping[str, str]:
        """`weights.digest.digest` of each tensor as the engine now holds it; empty if the engine cannot tell."""


class PolicyTrainer(Protocol):
    """`conf/trainer`: owns the weights. Every method is collective: all ranks call it with equal arguments."""

    def update(self, batch: TrainBatch) -> UpdateStats: ...

    def logprobs(self, sequences: Sequence[TokenIds], *, temperature: float) -> list[Floats]:
        """For each sequence [T] the logprobs [T - 1] of tokens 1.., nats: what `Engine.score` must reproduce."""

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Full tensors one by one under transformers' names, LoRA merged. Consume all of it on every rank."""

    def adapter(self, *, with_base: bool) -> Iterator[tuple[str, Tensor]]:
        """LoRA's matrices one by one, `<module>.lora_A.weight` [rank, in] and `<module>.lora_B.weight` [out, rank], B
        already multiplied by alpha / rank; and the frozen base under transformers' names, if it is wanted too."""

    def on_hub(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """What `parameters` or `adapter` gave on rank 0, as the model's files on the hub have it: the same bits, under
        other names and cut otherwise where transformers fuses tensors. Not collective; holds what one conversion
        needs together."""

    def save(self, folder: Path) -> None:
        """Write model (safetensors), optimizer, scheduler and RNG into `folder` (rank 0 writes)."""

    def load(self, folder: Path) -> None: ...


class RolloutSource(Protocol):
    """`conf/rollout`: where scored groups come from."""

    def take(self, num_groups: int, *, step: int) -> tuple[list[RolloutGroup], Dropped]: ...

    def counters(self) -> Mapping[str, float]:
        """Totals since the start of this process, by their full metric name; for the step's metrics."""

    def state(self) -> JSON: ...

    def restore(self, state: JSON) -> None: ...


class RemoteSource(RolloutSource, Protocol):
    """A source that other processes fill, and that may fail (`atropos/`)."""

    def take(self, num_groups: int, *, step: int) -> tuple[list[RolloutGroup], Dropped]:
        """Raises SourceUnavailable, with the reason, when its deadlines pass."""

    def is_ready(self, *, step: int) -> bool:
        """After SourceUnavailable: whether `take` would return at once. Looks briefly; reconnects if it can."""


class Ledger(Protocol):
    """Who remembers what the engine sampled for environments (`gateway/`)."""

    def lookup(
        self,
        sequences: Sequence[tuple[TokenIds, Mask]],
        *,
        claim: bool,
        logprobs: Sequence[Floats | None] | None = None,
    ) -> list[Provenance | None]:
        """For each (token_ids [T], trained [T]) what is known of its trained tokens; None unless all are. `claim`
        marks their completions as having come back; `logprobs` [T], where known, tell equal ones apart."""


class Evaluator(Protocol):
    """`conf/eval`: held-out prompts, answered by the engine."""

    def __call__(self, policy_version: int) -> dict[str, float]:
        """Metrics by name: `eval/<set>/accuracy` and so on."""


class Publisher(Protocol):
    """Moves the trainer's weights into the engine and proves that they arrived (`weights/publisher.py`)."""

    @property
    def num_syncs(self) -> int:
        """Begun so far."""

    @property
    def num_verified(self) -> int:
        """Of these, proven."""

    def recheck(self, *, before: int) -> None:
        """Before the sync to that version, and once: raise WrongSampler if the engine no longer holds what was proven.
        `publish` does so by itself."""

    def publish(self, version: int) -> SyncStats: ...


class Checkpointer(Protocol):
    """Saves and restores the whole run: weights, optimizer, RNG, data cursor. Collective."""

    def restore(self) -> int:
        """Load the newest valid checkpoint; return the number of finished steps (0 without one)."""

    def save(self, step: int) -> None: ...


class Recorder(Protocol):
    """Turns what happened in a step into metrics, samples and log lines."""

    def resume(self, step: int) -> None:
        """Forget what an interrupted process recorded after `step`: it will be done again."""

    def record(self, facts: StepFacts) -> None: ...


class Logger(Protocol):
    """`conf/logger`: who is told. Must never stop or slow a run."""

    def log(self, metrics: StepMetrics) -> None: ...

    def samples(self, step: int, records: Sequence[SampleRecord]) -> None: ...

    def close(self, summary: JSON) -> None: ...
