"""How the weights are trained: the settings of `trainer=fsdp2`."""

from collections.abc import Sequence
from typing import Annotated, Literal, Protocol, Self

from pydantic import Field, model_validator

from atropos_exp.config.lora import LoraSettings
from atropos_exp.config.settings import Count, Few, Index, Positive, Seconds, Settings
from atropos_exp.errors import UserError

Decay = Annotated[float, Field(ge=0, lt=1)]  # of a moving average

MAX_CHUNK_LOGITS = 1 << 26  # float32 logits alive at once: 256 MiB, and the same again for their gradient


class ModelChoice(Protocol):
    """The settings of `conf/model` that the trainer reads."""

    @property
    def attn_implementation(self) -> str: ...
    @property
    def gradient_checkpointing(self) -> bool: ...
    @property
    def trust_remote_code(self) -> bool: ...
    @property
    def lora(self) -> LoraSettings: ...
    def compute_dtype(self, device: str) -> str: ...


class TrainerSettings(Settings):
    """The settings of `conf/trainer`, whose YAML explains each. One process per device; weights, gradients and Adam's
    moments are sharded over all of them."""

    max_steps: Count
    num_mini_batches: Annotated[int, Field(ge=1, le=10**6)]
    layout: Literal["auto", "packed", "rows", "single"]
    max_tokens_per_micro_batch: Count
    learning_rate: Annotated[float, Field(ge=0, le=10)]
    scheduler: Literal["constant", "linear", "cosine"]
    warmup_steps: Index
    min_lr_ratio: Annotated[float, Field(ge=0, le=1, description="a part of the peak")]
    adam_beta1: Decay
    adam_beta2: Decay
    adam_epsilon: Annotated[float, Field(gt=0, le=1)]
    weight_decay: Annotated[float, Field(ge=0, le=100)]
    max_grad_norm: Positive
    importance_cap: Annotated[float | None, Field(gt=0, le=1e9, description="null: none")]
    sequence_parallel_size: Few
    offload_parameters: bool
    offload_optimizer: bool
    reshard_after_forward: bool
    max_bad_steps: Count
    timeout_s: Seconds

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.sequence_parallel_size > 1 and self.layout in ("rows", "single"):
            raise UserError(
                f"layout: got {self.layout}, expected packed or auto with trainer.sequence_parallel_size="
                f"{self.sequence_parallel_size}: only packed sequences are shared between ranks"
            )
        return self

    def attention(self, requested: str) -> str:
        """transformers' name of the attention for `model.attn_implementation`; our own for `auto` and `packed`.

        Raises UserError for one that sequence parallelism would silently get wrong: verl trades heads for sequence
        in flash attention only, any other sees the shard of its own rank.
        """
        from atropos_exp.parts.trainer.attention import NAME, ULYSSES_SAFE

        name = NAME if requested in ("auto", "packed", NAME) else requested
        if self.sequence_parallel_size > 1 and name not in ULYSSES_SAFE:
            raise UserError(
                f"trainer.sequence_parallel_size={self.sequence_parallel_size} with "
                f"model.attn_implementation={requested} would attend to a part of each sequence only. "
                "Choose model.attn_implementation=packed, or trainer.sequence_parallel_size=1."
            )
        return name


def require_ranks(world_size: int, sequence_parallel_size: int, head_counts: Sequence[int]) -> None:
    """Raise UserError unless ranks and attention heads divide by the sequence-parallel size."""
    if world_size % sequence_parallel_size:
        raise UserError(
            f"trainer.sequence_parallel_size={sequence_parallel_size} does not divide the {world_size} "
            "trainer processes"
        )
    query_heads, key_value_heads = head_counts
    fits = key_value_heads % sequence_parallel_size == 0 or sequence_parallel_size % key_value_heads == 0
    if query_heads % sequence_parallel_size or not fits:
        raise UserError(
            f"trainer.sequence_parallel_size={sequence_parallel_size} does not divide the attention heads of the model "
            f"({query_heads} query heads, {key_value_heads} key-value heads)"
        )
