"""What the tests of the trainer share: a tiny random model, batches, a loss and the same update by hand.

Also imported by `ranks.py`, which runs in processes of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from atropos_exp.parts.trainer.fsdp2 import VerlFSDP2
from atropos_exp.types import TrainBatch
from tests.helpers.paths import CONF

SETTINGS = CONF / "trainer" / "fsdp2.yaml"
VOCAB = 48


@dataclass(frozen=True)
class Lora:
    rank: int = 0
    alpha: int = 8
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "v_proj", "down_proj"])


@dataclass(frozen=True)
class Model:
    """The model settings that the trainer reads."""

    dtype: str = "float32"
    attn_implementation: str = "auto"
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False
    lora: Lora = Lora()

    def compute_dtype(self, device: str) -> str:
        return self.dtype


def write_model(folder: Path, *, tied: bool = True, num_layers: int = 2, **config: Any) -> Path:
    """A random Qwen2; the same bits every time."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(7)
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
    }
    model = Qwen2ForCausalLM(Qwen2Config(**(sizes | config)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return folder


def settings(**changes: Any) -> VerlFSDP2:
    """The shipped defaults, with an optimizer whose first step shows the gradient.

    Adam with epsilon = 1 moves a weight by lr * g / (|g| + 1) in its first step.
    """
    values = yaml.safe_load(SETTINGS.read_text())
    values.pop("_target_")
    plain = {"learning_rate": 1.0, "adam_epsilon": 1.0, "weight_decay": 0.0, "max_grad_norm": 1e9}
    return VerlFSDP2(**(values | plain | changes))


def make_batch(
    *, seed: int = 0, num_sequences: int = 12, temperature: float = 1.0, behaviour: str = "some", longest: int = 13
) -> TrainBatch:
    """Random tokens, ragged lengths, trained tokens in several stretches, advantages that differ by token."""
    generator = torch.Generator().manual_seed(seed)
    lengths_N = torch.randint(3, longest + 1, (num_sequences,), generator=generator)
    lengths_N[0], lengths_N[1] = 3, longest
    total = int(lengths_N.sum())
    starts_N = lengths_N.cumsum(0) - lengths_N
    trained_S = torch.rand(total, generator=generator) < 0.5
    trained_S[starts_N] = False
    trained_S[starts_N + 2] = True  # every sequence has a trained token
    has_behaviour_N = {
        "none": torch.zeros(num_sequences, dtype=torch.bool),
        "some": torch.arange(num_sequences) % 3 != 0,
        "all": torch.ones(num_sequences, dtype=torch.bool),
    }[behaviour]
    known_S = has_behaviour_N.repeat_interleave(lengths_N) & trained_S
    return TrainBatch(
        token_ids_S=torch.randint(0, VOCAB, (total,), generator=generator),
        lengths_N=lengths_N,
        trained_S=trained_S,
        advantages_S=torch.randn(total, generator=generator) * trained_S,
        behaviour_logprobs_S=(-3.9 + 0.8 * torch.randn(total, generator=generator)) * known_S,
        has_behaviour_N=has_behaviour_N,
        fresh_N=has_behaviour_N & (torch.arange(num_sequences) % 2 == 0),
        reference_logprobs_S=torch.zeros(total),
        has_reference_N=torch.zeros(num_sequences, dtype=torch.bool),
        supervised_N=torch.zeros(num_sequences, dtype=torch.bool),
        temperature_N=torch.full((num_sequences,), temperature),
        num_trained_tokens=int(trained_S.sum()),
    )


@dataclass
class WeightedLoss:
    """-(weight * advantage * logprob) + kl_coef * (logprob - reference)^2 / 2, mean over tokens of the mini-batch.

    Remembers what it was called with.
    """

    kl_coef: float = 0.0
    calls: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, **given: Any) -> tuple[Tensor, dict[str, float]]:
        self.calls.append({k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in given.items()})
        logprobs, mask = given["logprobs_NR"], given["mask_NR"]
        weights = 1.0 if given["importance_NR"] is None else given["importance_NR"]
        scale = given["dp_size"] / given["num_tokens"]
        policy = -(weights * given["advantages_NR"] * logprobs * mask).sum() * scale
        loss, kl = policy, 0.0
        if self.kl_coef:
            difference = (logprobs - given["reference_logprobs_NR"]) * mask
            loss = policy + self.kl_coef * (difference**2).sum() / 2 * scale
            kl = float((difference.detach() ** 2).sum() / 2 * scale)
        return loss, {"policy_loss": float(policy.detach()), "clip_fraction": 0.0, "reference_kl": kl}


def start(
    model_folder: Path,
    dump_folder: Path,
    *,
    model: Model | None = None,
    loss: Any = None,
    device: str = "cpu",
    **changes: Any,
) -> Any:
    return settings(**changes).start(
        model_folder=model_folder,
        model=model or Model(),
        loss=loss or WeightedLoss(),
        seed=0,
        device=device,
        dump_folder=dump_folder,
    )


def full_weights(trainer: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.parameters()}


def plain_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def split(batch: TrainBatch) -> list[dict[str, Tensor]]:
    """One dict per sequence."""
    names = ("token_ids", "trained", "advantages", "behaviour_logprobs", "reference_logprobs")
    parts = {name: getattr(batch, f"{name}_S").split(batch.lengths_N.tolist()) for name in names}
    return [{name: parts[name][n] for name in names} for n in range(len(batch.lengths_N))]


def plain_logprobs(model: Any, token_ids: Tensor, temperature: float) -> Tensor:
    """[T - 1], one sequence, nothing packed or padded."""
    logits = model(input_ids=token_ids[None]).logits[0].float() / temperature
    return torch.log_softmax(logits[:-1], -1)[torch.arange(len(token_ids) - 1), token_ids[1:]]


def plain_loss(model: Any, batch: TrainBatch, *, cap: float | None = 2.0) -> Tensor:
    """The loss of `WeightedLoss` with kl_coef=0, sequence by sequence and token by token."""
    total = torch.zeros(())
    facts = zip(split(batch), batch.has_behaviour_N.tolist(), batch.temperature_N.tolist(), strict=True)
    for sequence, known, temperature in facts:
        logprobs = plain_logprobs(model, sequence["token_ids"], temperature)
        for position in range(1, len(sequence["token_ids"])):
            if sequence["trained"][position]:
                logprob, weight = logprobs[position - 1], 1.0
                if cap is not None and known:
                    weight = min(float((logprob.detach() - sequence["behaviour_logprobs"][position]).exp()), cap)
                total = total - weight * sequence["advantages"][position] * logprob
    return total / batch.num_trained_tokens


def weights_after_step(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """Adam's first step by its formula, for the optimizer of `settings`."""
    model.zero_grad()
    loss.backward()
    return {name: p.detach() - p.grad / (p.grad.abs() + 1.0) for name, p in model.named_parameters()}
