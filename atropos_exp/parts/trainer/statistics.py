"""What is measured while training: sums over micro-batches, ranks and mini-batches, then one `UpdateStats`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from atropos_exp.parts.trainer.distributed import max_over_ranks, sum_over_ranks

MAX_LOG_RATIO = 20.0  # beyond it the k3 estimate only overflows


def importance_weights(log_ratio_M: Tensor, has_behaviour_M: Tensor, cap: float) -> Tensor:
    """Truncated importance weights min(exp(old - behaviour), cap), detached; 1 without behaviour logprobs."""
    weights_M = log_ratio_M.detach().clamp(max=math.log(cap)).exp()
    return torch.where(has_behaviour_M, weights_M, 1.0)


class Sums:
    """Running sums of one update, on the device until `collect`: no wait for it per micro-batch."""

    TOKENS = ("tokens", "entropy", "behaviour_tokens", "mismatch_kl", "gap", "truncated")
    LOSSES = ("loss", "policy_loss", "supervised_loss", "clip_fraction", "reference_kl")

    def __init__(self, device: torch.device) -> None:
        self._tokens = torch.zeros(len(self.TOKENS), dtype=torch.float64, device=device)
        self._losses = torch.zeros(len(self.LOSSES), dtype=torch.float64, device=device)
        self._gap_max = torch.zeros((), dtype=torch.float32, device=device)

    def add_tokens(self, entropy_M: Tensor, log_ratio_M: Tensor, has_behaviour_M: Tensor, cap: float | None) -> None:
        """`log_ratio_M` is the trainer's logprob minus the sampler's."""
        known = has_behaviour_M.float()
        clamped = log_ratio_M.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        gap = log_ratio_M.abs() * known
        truncated = (log_ratio_M > math.log(cap)) * known if cap is not None else torch.zeros_like(known)
        columns = [
            torch.ones_like(known),
            entropy_M,
            known,
            (clamped.exp() - 1 - clamped) * known,
            gap,
            truncated,
        ]
        self._tokens += torch.stack(columns).sum(1, dtype=torch.float64)
        self._gap_max = torch.maximum(self._gap_max, gap.max())

    def add_losses(self, loss: Tensor, parts: dict[str, float]) -> None:
        """The scalar that was differentiated, and what the policy loss says of it."""
        self._losses[0] += loss.detach()
        self._losses[1:] += torch.tensor(
            [parts.get(name, 0.0) for name in self.LOSSES[1:]], dtype=torch.float64, device=self._losses.device
        )

    def collect_losses(self, num_ranks: int) -> dict[str, float]:
        """Mean over ranks of the sums since the last call. Collective."""
        values = sum_over_ranks(self._losses.clone()) / num_ranks
        self._losses.zero_()
        return dict(zip(self.LOSSES, values.tolist(), strict=True))

    def collect_tokens(self) -> dict[str, float]:
        """Means over all trained tokens of all ranks. Collective."""
        totals = dict(zip(self.TOKENS, sum_over_ranks(self._tokens.clone()).tolist(), strict=True))
        tokens, behaviour = totals["tokens"], totals["behaviour_tokens"]
        known = behaviour > 0
        return {
            "entropy": totals["entropy"] / tokens,
            "mismatch_kl": totals["mismatch_kl"] / behaviour if known else math.nan,
            "logprob_gap_mean": totals["gap"] / behaviour if known else math.nan,
            "logprob_gap_max": float(max_over_ranks(self._gap_max.clone())) if known else math.nan,
            "importance_truncated_fraction": totals["truncated"] / behaviour if known else 0.0,
        }
