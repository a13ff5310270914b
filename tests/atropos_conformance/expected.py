"""What an update must come to, from the groups as they were sent: plain transformers, one sequence after the other.

Nothing of any trainer is used. GRPO with the unbiased standard deviation, averaged over trained tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

IGNORED = -100
SENTINEL = 1.0
EPSILON = 1e-6  # added to the standard deviation
Group = dict[str, Any]  # a ScoredData


def update(
    groups: Sequence[Group],
    *,
    weights: Path,
    reference: Path | None = None,
    kl_coef: float = 0.0,
    cap: float | None = 2.0,
    wrong: str = "",
) -> dict[str, float]:
    """policy, supervised, kl, total and grad_norm of one update. `cap`: of importance weights; None: none are used.

    `wrong` is a mistake to make, in order to see that it would be noticed: "unshifted", "tool_tokens", "pooled" (one
    baseline for all groups), "no_advantages" (those of the environment), "zero_first", "one_temperature".
    """
    model = load(weights)
    model.zero_grad()
    advantages = _advantages(groups, wrong)
    num_tokens = sum(int(_trained(group, at, wrong).sum()) for group in groups for at in range(len(group["tokens"])))
    sums = {"policy": 0.0, "supervised": 0.0, "kl": 0.0}
    for group, rows in zip(groups, advantages, strict=True):
        for at, ids in enumerate(group["tokens"]):
            supervised, trained = _is_supervised(group, at), _trained(group, at, wrong)
            temperature = 1.0 if supervised or wrong == "one_temperature" else temperature_of(group, at)
            new = _logprobs(model, ids, temperature, shift=0 if wrong == "unshifted" else 1)[trained[1:]]
            advantage = torch.tensor(np.broadcast_to(rows[at], len(ids))[trained], dtype=torch.float32)
            parts = {"policy": torch.zeros(()), "supervised": torch.zeros(()), "kl": torch.zeros(())}
            if supervised:
                parts["supervised"] = -new.sum()
            else:
                weight = _importance(group, at, trained, new.detach(), cap)
                parts["policy"] = -(advantage * weight * (new - new.detach()).exp()).sum()
                if reference is not None:
                    gap = _reference(group, at, ids, trained, temperature, reference) - new
                    parts["kl"] = (gap.exp() - gap - 1).sum()
            loss = parts["policy"] + parts["supervised"] + kl_coef * parts["kl"]
            if loss.requires_grad:
                (loss / num_tokens).backward()
            for name, value in parts.items():
                sums[name] += float(value.detach()) / num_tokens
    squares = [
        float(parameter.grad.double().square().sum()) for parameter in model.parameters() if parameter.grad is not None
    ]
    return {
        **sums,
        "total": sums["policy"] + sums["supervised"] + kl_coef * sums["kl"],
        "grad_norm": float(np.sqrt(sum(squares))),
    }


def logprobs(weights: Path, ids: Sequence[int], *, temperature: float = 1.0) -> list[float]:
    """[T] of each token after those before it; 0 for the first."""
    with torch.no_grad():
        return [0.0, *_logprobs(load(weights), ids, temperature, shift=1).tolist()]


@lru_cache(maxsize=32)
def load(weights: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32).eval()


def temperature_of(group: Group, at: int) -> float:
    override = (group.get("overrides") or [{}] * len(group["tokens"]))[at].get("temperature")
    return float(override or (group.get("generation_params") or {}).get("temperature") or 1.0)


def _logprobs(model: Any, ids: Sequence[int], temperature: float, *, shift: int) -> torch.Tensor:
    """[T - 1] of tokens 1..: read from the logits one before each, or, wrongly, from its own."""
    logits = model(torch.tensor([ids])).logits[0].float() / temperature
    logits = logits[:-1] if shift else logits[1:]
    return torch.log_softmax(logits, -1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


def _trained(group: Group, at: int, wrong: str) -> np.ndarray:
    """[T]; the first token has no prediction."""
    trained = np.array(group["masks"][at]) != IGNORED
    if wrong == "tool_tokens":
        trained[int(trained.argmax()) :] = True
    trained[0] = False
    return trained


def _is_supervised(group: Group, at: int) -> bool:
    overrides = (group.get("overrides") or [{}] * len(group["tokens"]))[at]
    return bool((group.get("group_overrides") or {}).get("sft") or overrides.get("sft"))


def _advantages(groups: Sequence[Group], wrong: str) -> list[list[Any]]:
    """Of each sequence, one number or [T]."""
    pooled = np.concatenate([group["scores"] for group in groups])
    found: list[list[Any]] = []
    for group in groups:
        overrides = group.get("overrides") or [{}] * len(group["tokens"])
        zeroed = [bool(override.get("set_advantage_to_zero")) for override in overrides]
        scores = np.array(group["scores"], dtype=np.float64)
        if wrong == "zero_first":
            scores = np.where(zeroed, 0.0, scores)
        base = pooled if wrong == "pooled" else scores
        constant = len(base) < 2 or np.ptp(base) == 0
        rows: list[Any] = (
            [0.0] * len(scores) if constant else list((scores - base.mean()) / (base.std(ddof=1) + EPSILON))
        )
        if group.get("advantages") and wrong != "no_advantages":
            rows = [np.array(row) for row in group["advantages"]]
        if wrong != "zero_first":
            rows = [0.0 if zero else row for zero, row in zip(zeroed, rows, strict=True)]
        found.append(rows)
    return found


def _importance(group: Group, at: int, trained: np.ndarray, new: torch.Tensor, cap: float | None) -> torch.Tensor:
    if cap is None or not group.get("inference_logprobs"):
        return torch.ones_like(new)
    behaviour = torch.tensor(np.array(group["inference_logprobs"][at])[trained], dtype=torch.float32)
    if bool((behaviour >= SENTINEL).any()):
        return torch.ones_like(new)  # a trained token without a logprob: those of the sequence are not known
    return (new - behaviour).exp().clamp(max=cap)


def _reference(
    group: Group, at: int, ids: Sequence[int], trained: np.ndarray, temperature: float, reference: Path
) -> torch.Tensor:
    if group.get("ref_logprobs"):
        return torch.tensor(np.array(group["ref_logprobs"][at])[trained], dtype=torch.float32)
    return torch.tensor(np.array(logprobs(reference, ids, temperature=temperature))[trained], dtype=torch.float32)
