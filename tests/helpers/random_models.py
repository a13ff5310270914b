"""Tiny random models, prompts for them, and what plain transformers says about both."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from atropos_exp.types import Floats, TokenIds

VOCAB = 48
CONTEXT = 512  # tokens


def random_model(*, tied: bool = True, kind: str = "qwen2", seed: int = 0, vocab: int = VOCAB) -> Any:
    """Two layers, head size 32, two query heads on one key head; weights large enough that tokens differ."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if kind == "mistral":
        sizes["sliding_window"] = 4
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **sizes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()


def random_prompts(lengths: list[int], seed: int = 0) -> list[TokenIds]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, VOCAB, size=length).astype(np.int32) for length in lengths]


def plain_logits(model: Any, token_ids: TokenIds) -> torch.Tensor:
    """[T, vocabulary], float64, from one forward pass over the whole sequence."""
    input_ids = torch.tensor(token_ids[None, :].astype(np.int64), device=model.device)
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=input_ids).logits[0].double().cpu()
    return logits


def plain_logprobs(model: Any, token_ids: TokenIds, temperature: float = 1.0) -> Floats:
    """Of every token but the first."""
    logprobs = torch.log_softmax(plain_logits(model, token_ids)[:-1] / temperature, dim=-1)
    return logprobs.gather(1, torch.tensor(token_ids[1:, None].astype(np.int64)))[:, 0].float().numpy()


def completion_logprobs(model: Any, prompt: TokenIds, completion: TokenIds, temperature: float = 1.0) -> Floats:
    return plain_logprobs(model, np.concatenate([prompt, completion]), temperature)[len(prompt) - 1 :]


def greedy_tokens(model: Any, prompt: TokenIds, max_tokens: int) -> list[int]:
    """Those of transformers' own generation."""
    input_ids = torch.tensor(prompt[None, :].astype(np.int64))
    whole = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        do_sample=False,
        max_new_tokens=max_tokens,
        pad_token_id=0,
    )
    tokens: list[int] = whole[0, len(prompt) :].tolist()
    return tokens
