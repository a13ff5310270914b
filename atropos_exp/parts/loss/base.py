"""What all policy losses share: verl's loss by name, its average over the mini-batch, and an optional KL term.

Each loss defines a cost l_it of token t of sequence i from its logprobs under the trained policy and under the policy
before the update, whose ratio is rho_it = exp(logprob_it - old_logprob_it). If the sampler's weights were older, l_it
is multiplied by the truncated importance weight min(exp(old_logprob_it - behaviour_logprob_it), cap). Over a mini-batch
of N sequences with T_i trained tokens each, `agg_mode` (verl's `agg_loss`) averages the costs:

    token_mean             sum_i sum_t l_it / sum_i T_i
    token_sum              sum_i sum_t l_it
    seq_mean_token_sum     sum_i sum_t l_it / N
    seq_mean_token_mean    sum_i (sum_t l_it / T_i) / N

With `kl_coef` > 0 the loss grows by kl_coef times the same average of an estimate of KL(policy || reference) per token.
With d = logprob - reference_logprob: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d; k1+ and k3+ take the gradient of k2.
verl clamps k3 at 10 (which d = -2.5 reaches), where its gradient is zero: the tokens that have become far less likely
than to the reference are pulled back no more. `k3_unclamped` has no such bound, and neither has the gradient of k2.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from atropos_exp.config.settings import NotNegative, Settings

if TYPE_CHECKING:
    from torch import Tensor


class VerlPolicyLoss(Settings):
    """A policy loss of verl's registry (`get_policy_loss_fn`) as a `PolicyLoss`.

    The loss of a micro-batch is divided by counts of the whole mini-batch, so that the sum over
    micro-batches and mean over ranks is the loss of the mini-batch however it was split.
    """

    kl_coef: Annotated[float, Field(ge=0, le=1e6, description="0: no reference model")]
    kl_estimator: Literal["k1", "k2", "k3", "k3_unclamped", "k1+", "k3+"]

    verl_name: ClassVar[str]

    @abstractmethod
    def aggregation(self) -> tuple[str, int | None]:
        """The mode of verl's `agg_loss`, and the `loss_scale_factor` that goes with it."""

    def clip_settings(self) -> dict[str, float]:
        """Those fields of verl's ActorConfig that bound the ratio of new to old policy."""
        return {}

    def __call__(
        self,
        *,
        logprobs_NR: Tensor,
        old_logprobs_NR: Tensor,
        advantages_NR: Tensor,
        mask_NR: Tensor,
        importance_NR: Tensor | None,
        reference_logprobs_NR: Tensor | None,
        supervised_NR: Tensor | None,
        num_tokens: int,
        num_sequences: int,
        dp_size: int,
    ) -> tuple[Tensor, dict[str, float]]:
        """See `PolicyLoss`. `clip_fraction` is a part of the trained tokens, `reference_kl` nats per trained token.

        A supervised token costs -advantage * logprob (its advantage is 1, or 0 where it is to teach nothing).
        """
        import torch
        from verl.trainer.ppo import core_algos as verl

        assert self.kl_coef == 0 or reference_logprobs_NR is not None, "kl_coef needs the reference logprobs"
        policy_NR = mask_NR if supervised_NR is None else mask_NR & ~supervised_NR

        def clean(values_NR: Tensor) -> Tensor:
            # verl multiplies by the mask in some modes, where a NaN or inf of the padding would survive
            return torch.where(policy_NR, values_NR, 0.0)

        mode, scale_factor = self.aggregation()
        global_batch_info = {
            "dp_size": dp_size,
            "batch_num_tokens": num_tokens,
            "global_batch_size": num_sequences,
            "loss_scale_factor": scale_factor,
        }
        policy_logprobs_NR = clean(logprobs_NR)
        policy_loss, verl_metrics = verl.get_policy_loss_fn(self.verl_name)(
            old_log_prob=clean(old_logprobs_NR),
            log_prob=policy_logprobs_NR,
            advantages=clean(advantages_NR),
            response_mask=policy_NR,
            loss_agg_mode=mode,
            config=_actor_config(self.clip_settings(), global_batch_info),
            rollout_is_weights=None if importance_NR is None else clean(importance_NR),
        )
        loss, kl_sum, supervised_loss = policy_loss, policy_loss.new_zeros(()), policy_loss.new_zeros(())
        if reference_logprobs_NR is not None:
            kl_NR = _kl(policy_logprobs_NR, clean(reference_logprobs_NR), self.kl_estimator)
            kl_sum = clean(kl_NR.detach()).sum()
            if self.kl_coef > 0:
                loss = loss + self.kl_coef * verl.agg_loss(kl_NR, policy_NR, mode, **global_batch_info)
        if supervised_NR is not None:
            examples_NR = mask_NR & supervised_NR
            costs_NR = -torch.where(examples_NR, advantages_NR, 0.0) * torch.where(examples_NR, logprobs_NR, 0.0)
            supervised_loss = verl.agg_loss(costs_NR, examples_NR, mode, **global_batch_info)
            loss = loss + supervised_loss

        # one transfer from the device for all the numbers
        numbers = [policy_NR.sum(), policy_loss.detach(), supervised_loss.detach(), kl_sum]
        local_tokens, policy_value, supervised_value, kl_value = torch.stack(
            [number.to(policy_loss.dtype) for number in numbers]
        ).tolist()
        clipped = verl_metrics.get("actor/pg_clipfrac", 0.0) + verl_metrics.get("actor/pg_clipfrac_lower", 0.0)
        return loss, {
            "policy_loss": policy_value,
            "supervised_loss": supervised_value,
            "clip_fraction": clipped * local_tokens / num_tokens * dp_size,
            "reference_kl": kl_value / num_tokens * dp_size,
        }


class AveragedLoss(VerlPolicyLoss):
    """A policy loss whose average over tokens and sequences is a setting."""

    agg_mode: Literal["token_mean", "token_sum", "seq_mean_token_sum", "seq_mean_token_mean"]

    def aggregation(self) -> tuple[str, int | None]:
        return self.agg_mode.replace("_", "-"), None


class ClippedRatio(VerlPolicyLoss):
    """A policy loss that bounds the ratio of new to old policy to [1 - clip_low, 1 + clip_high]."""

    clip_low: Annotated[float, Field(ge=0, le=1, description="1: no lower bound")]
    clip_high: NotNegative  # the ratio stays below 1 + clip_high

    def clip_settings(self) -> dict[str, float]:
        return {"clip_ratio_low": self.clip_low, "clip_ratio_high": self.clip_high}


def _kl(logprobs: Tensor, reference_logprobs: Tensor, estimator: str) -> Tensor:
    from verl.trainer.ppo import core_algos as verl

    if estimator == "k3_unclamped":
        difference = logprobs - reference_logprobs
        return (-difference).expm1() + difference
    kl: Tensor = verl.kl_penalty(logprobs, reference_logprobs, estimator)
    return kl


def _actor_config(clip_settings: dict[str, Any], global_batch_info: dict[str, Any]) -> Any:
    from verl.workers.config import ActorConfig

    # strategy, rollout_n and use_dynamic_bsz only satisfy its validation: no policy loss reads them
    return ActorConfig(
        strategy="fsdp2", rollout_n=1, use_dynamic_bsz=True, global_batch_info=global_batch_info, **clip_settings
    )
