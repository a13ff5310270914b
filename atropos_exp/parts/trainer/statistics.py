"""What an update measures: sums over micro-batches and ranks, kept on the device, for one `UpdateStats`."""

import math

import torch
from torch import Tensor

from atropos_exp.parts.trainer.distributed import max_over_ranks, sum_over_ranks

MAX_LOG_RATIO = 20.0  # beyond it the k3 estimate only overflows


def importance_weights(log_ratio_M: Tensor, has_behaviour_M: Tensor, cap: float) -> Tensor:
    """Truncated importance weights [M], min(exp(log_ratio), cap), without gradient; 1 without behaviour logprobs.

    `log_ratio_M` is the old policy's logprob minus the behaviour policy's, in nats."""
    weights_M = log_ratio_M.detach().clamp(max=math.log(cap)).exp()
    return torch.where(has_behaviour_M, weights_M, 1.0)


class Sums:
    """Running sums of one update, on the device until collected: no micro-batch waits for a transfer."""

    TOKENS = ("tokens", "entropy", "behaviour_tokens", "mismatch_kl", "gap", "truncated", "fresh_tokens", "fresh_gap")
    LOSSES = ("loss", "policy_loss", "supervised_loss", "clip_fraction", "reference_kl")

    def __init__(self, device: torch.device) -> None:
        self._tokens = torch.zeros(len(self.TOKENS), dtype=torch.float64, device=device)
        self._losses = torch.zeros(len(self.LOSSES), dtype=torch.float64, device=device)
        self._gap_max = torch.zeros((), dtype=torch.float32, device=device)

    def add_tokens(
        self, entropy_M: Tensor, log_ratio_M: Tensor, has_behaviour_M: Tensor, fresh_M: Tensor, cap: float | None
    ) -> None:
        """Add the tokens [M] of a micro-batch. `log_ratio_M` is the trainer's logprob minus the sampler's, nats."""
        known, fresh = has_behaviour_M.float(), fresh_M.float()
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
            fresh,
            gap * fresh,
        ]
        self._tokens += torch.stack(columns).sum(1, dtype=torch.float64)
        self._gap_max = torch.maximum(self._gap_max, gap.max())

    def add_losses(self, loss: Tensor, parts: dict[str, float]) -> None:
        """Add the scalar `loss` of a micro-batch, and the parts that the policy loss reports."""
        self._losses[0] += loss.detach()
        self._losses[1:] += torch.tensor(
            [parts.get(name, 0.0) for name in self.LOSSES[1:]], dtype=torch.float64, device=self._losses.device
        )

    def collect_losses(self, num_ranks: int) -> dict[str, float]:
        """The means over ranks of the loss sums since the last call, which start from 0 again. Collective."""
        values = sum_over_ranks(self._losses.clone()) / num_ranks
        self._losses.zero_()
        return dict(zip(self.LOSSES, values.tolist(), strict=True))

    def collect_tokens(self) -> dict[str, float]:
        """The means over all trained tokens of all ranks, by their names in `UpdateStats`. Collective."""
        totals = dict(zip(self.TOKENS, sum_over_ranks(self._tokens.clone()).tolist(), strict=True))
        tokens, behaviour = totals["tokens"], totals["behaviour_tokens"]
        known = behaviour > 0
        return {
            "entropy": totals["entropy"] / tokens,
            "mismatch_kl": totals["mismatch_kl"] / behaviour if known else math.nan,
            "logprob_gap_mean": totals["gap"] / behaviour if known else math.nan,
            "logprob_gap_max": float(max_over_ranks(self._gap_max.clone())) if known else math.nan,
            "fresh_gap_mean": totals["fresh_gap"] / totals["fresh_tokens"] if totals["fresh_tokens"] else math.nan,
            "importance_truncated_fraction": totals["truncated"] / behaviour if known else 0.0,
        }
