"""What `trainer_gpu.py` measures: sizes of model and batch, and the ways to run one update."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from atropos_exp.parts.trainer import logprob_head

QWEN_0_5B = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
}


@dataclass(frozen=True, kw_only=True)
class Size:
    model: dict[str, int]
    num_sequences: int
    prompt: int
    response: int


FULL = Size(model=QWEN_0_5B, num_sequences=32 * 16, prompt=128, response=256)
SMOKE = Size(model=TINY, num_sequences=16, prompt=4, response=12)


@dataclass(frozen=True, kw_only=True)
class Lora:
    rank: int = 0
    alpha: int = 32
    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model settings that the trainer reads."""

    lora: Lora = Lora()
    gradient_checkpointing: bool = False
    attn_implementation: str = "auto"
    trust_remote_code: bool = False

    def compute_dtype(self, device: str) -> str:
        return "bfloat16"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A way to run the update. `trainer` holds what differs from the shipped settings."""

    name: str
    model: Model = Model()
    trainer: dict[str, Any] = field(default_factory=dict)
    chunk: int = logprob_head.MAX_CHUNK_LOGITS


BUDGET = {"max_tokens_per_micro_batch": 49152}
ONE_GPU = (
    Variant(name="shipped settings"),
    Variant(name="48k tokens a pass", trainer=BUDGET),
    Variant(name="chunks of logits x 4", chunk=4 * logprob_head.MAX_CHUNK_LOGITS),
    Variant(name="checkpointing", model=Model(gradient_checkpointing=True)),
    Variant(name="checkpointing, 96k", model=Model(gradient_checkpointing=True),
            trainer={"max_tokens_per_micro_batch": 98304}),
    Variant(name="offload", trainer={"offload_parameters": True, "offload_optimizer": True}),
    Variant(name="LoRA 16", model=Model(lora=Lora(rank=16))),
    Variant(name="LoRA 16, checkp., offload", model=Model(lora=Lora(rank=16), gradient_checkpointing=True),
            trainer={"offload_parameters": True, "offload_optimizer": True}),
)  # fmt: skip
SEVERAL_GPUS = (
    Variant(name="by data"),
    Variant(name="by data, no reshard", trainer={"reshard_after_forward": False}),
    Variant(name="by data, 48k", trainer=BUDGET),
    Variant(name="by sequence (Ulysses)", trainer={"sequence_parallel_size": 2}),
    Variant(name="by sequence, 48k", trainer={"sequence_parallel_size": 2, **BUDGET}),
    Variant(name="by data, checkp., offload", model=Model(gradient_checkpointing=True),
            trainer={"offload_parameters": True, "offload_optimizer": True}),
    Variant(name="by data, LoRA 16", model=Model(lora=Lora(rank=16))),
)  # fmt: skip
