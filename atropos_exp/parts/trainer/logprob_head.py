"""An output head that returns log-probabilities instead of logits, and only for trained tokens.

The head of a language model normally turns every hidden state into logits over the vocabulary, the largest
tensor of the whole step. Here it gathers the hidden states that predict a trained token, makes their logits
chunk by chunk, and returns log-probability and entropy: [1, M, 2] in place of [1, S, vocabulary]. Chunks are
recomputed in the backward pass, so only one of them is alive at a time.

It replaces `forward` of the head's instance, inside of FSDP's hooks: sharded, tied and half-precision heads work.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from atropos_exp.errors import UserError
from atropos_exp.parts.trainer.settings import MAX_CHUNK_LOGITS

# Config entries of architectures that change the logits after the head.
SCALED_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")


@dataclass(frozen=True, kw_only=True, eq=False)
class LogprobRequest:
    """What the head computes in the next forward pass."""

    positions_M: Tensor  # int64 into the packed sequence: the hidden state before each trained token
    targets_M: Tensor  # int64, the trained tokens
    temperature: float | Tensor  # one for all, or [M] float32
    with_entropy: bool


class LogprobHead:
    """Replaces the output head of `model`. While `request` is set it answers that; otherwise it returns plain logits.

    Raises UserError for models that change their logits after the head.
    """

    def __init__(self, model: Any) -> None:
        config: Any = model.config
        scaled = [name for name in SCALED_LOGITS if getattr(config, name, None) not in (None, 1, 1.0)]
        if scaled:
            raise UserError(
                f"models that change their logits after the output head are not supported: the config of "
                f"{type(model).__name__} sets {', '.join(scaled)}. Choose another model."
            )
        head: nn.Module = model.get_output_embeddings()
        self._logits: Callable[[Tensor], Tensor] = head.forward
        self._chunk_size = max(64, MAX_CHUNK_LOGITS // int(config.get_text_config().vocab_size))
        self.request: LogprobRequest | None = None
        head.forward = self._forward

    def _forward(self, hidden_1SH: Tensor) -> Tensor:
        request = self.request
        if request is None:
            return self._logits(hidden_1SH)
        hidden_MH = hidden_1SH[0].index_select(0, request.positions_M)
        num_tokens = len(hidden_MH)
        if num_tokens <= self._chunk_size:
            return self._chunk(request, hidden_MH, slice(None))
        parts = [slice(start, start + self._chunk_size) for start in range(0, num_tokens, self._chunk_size)]
        chunks = [
            checkpoint(self._chunk, request, hidden_MH[part], part, use_reentrant=False, preserve_rng_state=False)
            for part in parts
        ]
        return torch.cat(chunks, dim=1)

    def _chunk(self, request: LogprobRequest, hidden_MH: Tensor, part: slice) -> Tensor:
        """Logprobs and entropies [1, M, 2] of one part of the request."""
        targets_M, temperature = request.targets_M[part], request.temperature
        logits = self._logits(hidden_MH).float()
        if isinstance(temperature, Tensor):
            logits = logits / temperature[part, None]
        elif temperature != 1.0:
            logits = logits / temperature
        logprobs_MV = torch.log_softmax(logits, dim=-1)
        logprobs_M = logprobs_MV.gather(-1, targets_M[:, None])[:, 0]
        with torch.no_grad():
            if request.with_entropy:
                entropy_M = -(logprobs_MV.exp() * logprobs_MV).sum(-1)
            else:
                entropy_M = torch.zeros_like(logprobs_M)
        return torch.stack([logprobs_M[None], entropy_M[None]], dim=-1)  # not a view: FSDP hooks the output
